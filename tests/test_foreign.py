"""Logs of other programs, small ones in the formats that these write; and what is no log at all."""

import gzip
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.errors import UserError
from gpt.foreign import read_log
from gpt.foreign.lines import LINE_CHARACTERS, MOST_BYTES, parse_number
from gpt.foreign.names import meaning
from gpt.history import History
from gpt.metrics import METRICS_NAME, MetricsLog


def put(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def read(tmp_path: Path, text: str, name: str = "run.log") -> History:
    return read_log(put(tmp_path / name, text))


def column(table, name: str) -> list[float]:
    return [round(value, 9) for value in table[name].tolist()]


SPELLINGS = {
    "step": "step Step _step global_step trainer/global_step iter iteration validate_step",
    "loss": "loss train_loss train/loss train_loss_step loss/train TrainLoss trainLoss lm-loss "
    "loss/out train/CrossEntropyLoss loss_metrics/global_avg_loss",
    "val_loss": "val_loss eval_loss val/loss valid_loss tel eval/loss validation_metrics/loss "
    "test_loss eval/c4_en-validation/CrossEntropyLoss eval_c4_loss",
    "lr": "lr learning_rate train/learning_rate optim/lr",
    "lrs/AdamW": "lr-AdamW",
    "lrs/group0": "optim/learning_rate_group0",
    "lrs/matrices": "train/lr/matrices",
    "grad_norm": "grad_norm train/grad_norm gnorm norm optim/total_grad_norm grad_2.0_norm_total",
    "tokens_per_s": "tokens_per_s tokens_per_sec tok/s tps tok/sec throughput(tps) speed/wps",
    "step_time_s": "dt iter_time train/dt time(ms) dt_ms",
    "epoch": "epoch train/epoch Epoch",
    "tokens": "tokens num_input_tokens_seen optim/total_tokens",
    "mfu": "mfu mfu(%) bf16_mfu",
    "val_bpb": "val_bpb val/bpb Validation-bpb",
    "train_loss": "eval/train_loss",
    "update_ratio/blocks.0.attn.wq.weight": "layers/update_ratio/blocks.0.attn.wq.weight",
    "slope_after": "train/slope_after",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_a_column_holds(name):
    for spelled in SPELLINGS[name].split():
        found = meaning(spelled)
        assert found is not None, spelled
        assert found.name == name, spelled


def test_what_is_nothing_that_we_know():
    for spelled in (
        *("", "best_val_loss", "aux loss", "eval/aux_loss", "lm loss vs samples", "lrm"),
        *("layers/x", "loss scale", "eval_runtime", "eval/epoch", "learning_rate_decay"),
        *("bpb?" * 99, "accuracy"),
    ):
        assert meaning(spelled) is None, spelled


def test_units_of_a_name():
    assert meaning("dt_ms").scale == 1e-3
    assert meaning("elapsed time per iteration (ms)").scale == 1e-3
    assert meaning("dt").scale == 1


def test_numbers():
    numbers = {"1.5": 1.5, " 1e-3 ": 1e-3, "'2'": 2, "1,234,567": 1234567, "30%": 30, "1_000": 1000}
    numbers |= {"inf": math.inf, "-Infinity": -math.inf, "9" * 400: math.inf}
    for text, number in numbers.items():
        assert parse_number(text) == number
    assert all(parse_number(text) is None for text in ("", "n/a", "1,5", "None", "0x10", "9,9%%"))


def test_nan_and_decimal_commas():
    assert all(math.isnan(parse_number(text)) for text in ("nan", "NaN", "-nan"))
    assert parse_number("1,5", decimal_comma=True) == 1.5


NANOGPT = """\
Overriding config with config/train_tiny.py:
max_iters = 500 # enough for a laptop
tokens per iteration will be: 1,024
found vocab_size = 65 (inside data/tiny/meta.pkl)
number of parameters: 0.80M
step 0: train loss 4.2000, val loss 4.2100
iter 0: loss 4.1900, time 3142.97ms, mfu -100.00%
iter 10: loss 3.1500, time 16.00ms, mfu 20.47%
step 20: train loss 2.9000, val loss 2.9500
saving checkpoint to out-tiny
iter 20: loss 2.9100, time 2812.97ms, mfu 20.00%
"""


def test_nanogpt(tmp_path):
    history = read(tmp_path, NANOGPT, "train.log")
    assert (history.name, history.source) == ("train.log", "nanogpt")
    assert column(history.train, "step") == [0, 10, 20]
    assert column(history.train, "loss") == [4.19, 3.15, 2.91]
    assert history.train["step_time_s"][1] == pytest.approx(0.016)
    assert history.train["tokens_per_s"][1] == pytest.approx(64_000)
    # The clock runs on through an evaluation: that is no step's time.
    assert np.isnan(history.train["step_time_s"][[0, 2]]).all()
    assert column(history.evals, "step") == [0, 20]
    assert column(history.evals, "val_loss") == [4.21, 2.95]
    assert column(history.evals, "train_loss") == [4.2, 2.9]
    assert (history.total_steps, history.vocab_size, history.finished) == (500, 65, False)
    assert history.notes == ()


def test_a_later_override_of_the_length_counts_and_the_end_is_known(tmp_path):
    lines = NANOGPT + "Overriding: max_iters = 30\niter 30: loss 2.8, time 16.00ms, mfu 20.47%\n"
    history = read(tmp_path, lines)
    assert (history.total_steps, history.finished) == (30, True)


def test_llm_c(tmp_path):
    history = read(
        tmp_path,
        "| total batch size      | 524288   |\n"
        "| max_steps             | -1       |\n"
        "| vocab_size V          | 50257    |\n"
        "| padded_vocab_size Vp  | 50304    |\n"
        "val loss 11.009\n"
        "step    1/19560 | loss 11.008 (+nanz)| norm 15.36 (+nanz)| lr 8.57e-07 | 3056.36 ms "
        "| 42.6% bf16 MFU | 171539 tok/s\n"
        "step    2/19560 | loss nan (+0.10z)| norm inf (-0.3z)| lr 1.71e-06 | 2862.36 ms "
        "| 45.6% bf16 MFU | 183150 tok/s\n"
        "val loss 10.5\n",
    )
    assert history.source == "console"
    assert history.train["loss"][0] == 11.008
    assert math.isnan(history.train["loss"][1])
    assert history.train["grad_norm"][1] == math.inf
    assert column(history.train, "lr") == [0, 1.71e-6] or history.train["lr"][0] == 8.57e-7
    assert column(history.train, "tokens_per_s") == [171539, 183150]
    assert column(history.train, "step_time_s") == [3.05636, 2.86236]
    assert column(history.train, "mfu") == [42.6, 45.6]
    assert column(history.evals, "step") == [0, 2]
    assert (history.total_steps, history.vocab_size, history.finished) == (19560, 50257, False)
    assert "without a step: 2" in history.notes[0]


def test_llm_c_log_file(tmp_path):
    history = read(
        tmp_path,
        "s:0 tel:11.0\ns:0 trl:10.9 lr:0.000001 norm:15.37\ns:1 trl:10.8 lr:0.000002 norm:15.2\n"
        "s:2 eval:0.2524\ns:2 tel:10.7\n",
        "main.log",
    )
    assert column(history.train, "loss") == [10.9, 10.8]
    assert column(history.train, "grad_norm") == [15.37, 15.2]
    assert column(history.evals, "val_loss") == [11.0, 10.7]
    assert column(history.evals, "step") == [0, 2]


def test_nanochat(tmp_path):
    history = read(
        tmp_path,
        "Vocab size: 65,536\n"
        "Calculated number of iterations from target data:param ratio: 21,400\n"
        "Step 00000 | Validation bpb: 3.314\n"
        "step 00000/21400 (0.00%) | loss: 11.09 | lrm: 1.00 | dt: 19243.21ms | tok/sec: 27,245 | "
        "bf16_mfu: 1.41 | epoch: 1 pq: 0 rg: 0 | total time: 0.00m\n"
        "step 00001/21400 (0.00%) | loss: 10.80 | lrm: 1.00 | dt: 543.21ms | tok/sec: 967,245 | "
        "bf16_mfu: 49.41 | epoch: 1 pq: 0 rg: 0 | total time: 0.50m | eta: 12.0m\n",
    )
    assert column(history.train, "loss") == [11.09, 10.8]
    assert column(history.train, "tokens_per_s") == [27245, 967245]
    assert column(history.train, "step_time_s") == [19.24321, 0.54321]
    assert column(history.train, "time_s") == [0, 30]
    assert column(history.evals, "val_bpb") == [3.314]
    assert "val_loss" not in history.evals
    assert "lr" not in history.train  # `lrm` is a factor
    assert (history.total_steps, history.vocab_size) == (21400, 65536)


def test_litgpt_counts_micro_steps_and_shows_an_old_validation_loss(tmp_path):
    line = "Epoch 1 | iter {} step {} | loss train: {}, val: {} | iter time: 120.5 ms{} remaining"
    history = read(
        tmp_path,
        "\n".join(
            [
                line.format(8, 2, 10.3, "n/a", " (step)"),
                line.format(16, 4, 9.3, "n/a", ""),
                "iter 16: val loss 9.2345, val time: 2023.11 ms",
                line.format(24, 6, 8.3, 9.2345, ""),
                line.format(32, 8, 8.2, 9.2345, ""),
            ]
        ),
    )
    assert column(history.train, "step") == [8, 16, 24, 32]
    assert column(history.train, "loss") == [10.3, 9.3, 8.3, 8.2]
    assert column(history.train, "step_time_s") == [0.1205] * 4
    assert (column(history.evals, "step"), column(history.evals, "val_loss")) == ([16], [9.2345])


def test_torchtitan_in_colours(tmp_path):
    before = "[titan] 2026-10-01 12:00:00,123 - root - INFO - "
    history = read(
        tmp_path,
        f"{before}\x1b[31mstep:  1  \x1b[32mloss:  8.1234  \x1b[38;5;214mgrad_norm:  1.4532  "
        "\x1b[36mmemory:  5.20GiB(6.55%)  \x1b[34mtps: 12,345  \x1b[36mtflops: 100.11  "
        "\x1b[35mmfu: 32.10%\x1b[39m\n"
        f"{before}\x1b[33mvalidate step:  1  \x1b[32mloss:  7.2000  \x1b[36mmemory:  5.20GiB(6%)  "
        "\x1b[34mtps: 22,345\x1b[39m\n",
    )
    assert column(history.train, "loss") == [8.1234]
    assert column(history.train, "grad_norm") == [1.4532]
    assert column(history.train, "tokens_per_s") == [12345]  # not the validation's
    assert column(history.evals, "val_loss") == [7.2]


def test_megatron(tmp_path):
    line = (
        " [2026-01-01 10:00:00.123456] iteration {:8d}/    1000 | consumed samples:        25600 |"
        " elapsed time per iteration (ms): 1234.5 | learning rate: 1.500000E-04 |"
        " global batch size:   256 | lm loss: {:E} | loss scale: 1.0 | grad norm: 1.234 |"
        " number of skipped iterations:   0 | number of nan iterations:   0 |\n"
    )
    history = read(
        tmp_path,
        line.format(100, 9.5)
        + line.format(200, 8.5)
        + " validation loss at iteration 200 | lm loss value: 8.4E+00 | lm loss PPL: 4.4E+03 | \n",
    )
    assert column(history.train, "loss") == [9.5, 8.5]
    assert column(history.train, "lr") == [1.5e-4] * 2
    assert column(history.train, "step_time_s") == [1.2345] * 2
    assert column(history.train, "grad_norm") == [1.234] * 2
    assert (column(history.evals, "step"), column(history.evals, "val_loss")) == ([200], [8.4])
    assert (history.total_steps, history.finished) == (1000, False)


def test_modded_nanogpt_below_its_own_source(tmp_path):
    history = read(
        tmp_path,
        "def train(step=0, loss = 1.0):\n    val_loss = 0.0\n    for step in range(5):\n"
        "        if step == 3: loss = 4.0\n"
        "        print(f'step:{step}/{n} val_loss:{val_loss:.4f}')\n"
        "step:0/3 val_loss:10.8258 train_time:0ms step_avg:nanms\n"
        "step:1/3 train_loss:10.82 train_time:1881ms step_avg:nanms\n"
        "step:2/3 train_loss:10.43 train_time:18917ms step_avg:9458.5ms\n",
    )
    assert column(history.train, "loss") == [10.82, 10.43]
    assert column(history.train, "time_s") == [1.881, 18.917]
    assert column(history.evals, "val_loss") == [10.8258]
    assert history.total_steps == 3


def test_hugging_face_between_progress_bars(tmp_path):
    history = read(
        tmp_path,
        "Map: 100%|###| 700/700 [00:00<00:00]\n"
        "  0%|          | 0/60 [00:00<?, ?it/s]\r  3%|3   | 2/60 [00:01<00:09,  9.9it/s]\r"
        "{'loss': '3.6', 'grad_norm': '0.8', 'learning_rate': '3e-05', 'epoch': '0.08'}\r"
        "  7%|6   | 4/60 [00:02<00:09,  9.9it/s]\r"
        "{'loss': 3.2, 'grad_norm': 0.7, 'learning_rate': 2e-05, 'epoch': 0.16}\n"
        "  0%|          | 0/5 [00:00<?, ?it/s]\r100%|####| 5/5 [00:00<00:00]\r"
        "{'eval_loss': 3.1, 'eval_runtime': 1.2, 'eval_samples_per_second': 9.1, 'epoch': 0.16}\n"
        " 10%|6   | 6/60 [00:02<00:09]{'loss': 3.0, 'grad_norm': 0.6, 'epoch': 0.24}\n"
        "{'train_runtime': 70.47, 'train_samples_per_second': 1.277, 'train_loss': 2.286}\n",
    )
    assert column(history.train, "step") == [2, 4, 6]
    assert column(history.train, "loss") == [3.6, 3.2, 3.0]
    assert column(history.train, "grad_norm") == [0.8, 0.7, 0.6]
    assert (column(history.evals, "step"), column(history.evals, "val_loss")) == ([4], [3.1])
    assert (history.total_steps, history.finished) == (60, False)


def test_hugging_face_without_bars_is_counted(tmp_path):
    history = read(
        tmp_path,
        "{'loss': 3.6, 'learning_rate': 3e-05, 'epoch': 0.08}\n"
        "{'loss': 3.5, 'learning_rate': 2e-05, 'epoch': 0.16}\n",
    )
    assert column(history.train, "step") == [1, 2]
    assert column(history.train, "lr") == [3e-5, 2e-5]
    assert "counted" in history.notes[0]


def test_steps_that_begin_anew_in_each_epoch(tmp_path):
    history = read(
        tmp_path,
        "Epoch 0:  50%|#  | 50/100 [00:10<00:00, loss=2.50]\n"
        "Epoch 0: 100%|##| 100/100 [00:10<00:00, loss=2.40]\n"
        "Validation: 100%|##| 7/7 [00:10<00:00]\n"
        "Epoch 1:  50%|#  | 50/100 [00:10<00:10, loss=2.30, val_loss=2.6]\n"
        "Epoch 1: 100%|##| 100/100 [00:10<00:00, loss=2.20, val_loss=2.6]\n",
    )
    assert column(history.train, "step") == [50, 100, 150, 200]
    assert column(history.train, "loss") == [2.5, 2.4, 2.3, 2.2]
    assert (column(history.evals, "step"), column(history.evals, "val_loss")) == ([150], [2.6])
    assert "anew in each epoch" in history.notes[0]


def test_our_own_console_output(tmp_path):
    history = read(
        tmp_path,
        "step 250/2000  loss 2.3456  lr 3.00e-04  grad 0.85  12,345 tok/s  1m40s left\n"
        "eval 250/2000  val loss 2.1000 nats/token, 1.0100 bits/byte  train loss 2.2000\n"
        "step 260/2000  loss 2.3000  lr 2.90e-04  grad 0.85  12,345 tok/s  1m40s left\n",
    )
    assert column(history.train, "loss") == [2.3456, 2.3]
    assert column(history.train, "tokens_per_s") == [12345] * 2
    assert column(history.evals, "val_loss") == [2.1]
    assert column(history.evals, "val_bpb") == [1.01]
    assert column(history.evals, "train_loss") == [2.2]


def test_only_the_first_process_of_many_is_read(tmp_path):
    lines = [
        f"[rank{rank}]:step={step} loss={loss + rank}"
        for step, loss in ((10, 3.0), (20, 2.0))
        for rank in (1, 0)
    ]
    history = read(tmp_path, "\n".join(lines))
    assert column(history.train, "loss") == [4, 3]
    assert history.notes == ()


def test_lines_without_any_step_are_counted(tmp_path):
    history = read(tmp_path, "loss: 3.0\nsaved\nloss: 2.0 val loss: 2.5\n")
    assert column(history.train, "step") == [1, 2]
    assert column(history.evals, "step") == [2]


def test_another_encoding(tmp_path):
    text = "step 1 loss 3.0\r\nstep 2 loss 2.5 – gut\r\n"
    for encoding in ("utf-16", "utf-8-sig", "latin-1"):
        path = put(tmp_path / encoding, text.replace("–", "ü"), encoding)
        assert column(read_log(path).train, "loss") == [3, 2.5]


def test_later_lines_replace_those_that_a_restart_goes_back_over(tmp_path):
    history = read(
        tmp_path,
        "step 0: train loss 4.0, val loss 4.0\niter 0: loss 4.0, time 1.00ms, mfu 1%\n"
        "iter 10: loss 3.0, time 1.00ms, mfu 1%\n"
        "step 20: train loss 2.9, val loss 2.9\niter 20: loss 2.9, time 1.00ms, mfu 1%\n"
        "iter 30: loss 2.8, time 1.00ms, mfu 1%\niter 40: loss 2.7, time 1.00ms, mfu 1%\n"
        "Resuming training from out\n"
        "step 20: train loss 2.9, val loss 2.95\niter 20: loss 2.91, time 1.00ms, mfu 1%\n"
        "iter 30: loss 2.81, time 1.00ms, mfu 1%\n",
    )
    assert column(history.train, "step") == [0, 10, 20, 30]
    assert column(history.train, "loss") == [4.0, 3.0, 2.91, 2.81]
    assert column(history.evals, "val_loss") == [4.0, 2.95]
    assert "go back once, first to 20" in history.notes[0]


def test_two_restarts_and_an_evaluation_that_was_undone(tmp_path):
    steps = [(1, 9.0), (2, 8.0), (3, 7.0), (2, 8.1), (3, 7.1), (1, 9.2)]
    lines = [{"step": step, "loss": loss} for step, loss in steps]
    lines.insert(3, {"step": 3, "val_loss": 5.0})
    text = "\n".join(map(json.dumps, lines))
    history = read(tmp_path, text)
    assert column(history.train, "step") == [1]
    assert column(history.train, "loss") == [9.2]
    assert len(history.evals) == 0
    assert "go back 2 times" in history.notes[0]


def test_lines_in_no_order_are_sorted(tmp_path):
    text = "step,loss\n" + "".join(f"{step},{step / 10}\n" for step in range(10, 0, -1))
    history = read(tmp_path, text)
    assert column(history.train, "step") == list(range(1, 11))
    assert column(history.train, "loss") == [step / 10 for step in range(1, 11)]
    assert "sorted" in history.notes[0]


def test_a_step_that_is_shown_twice_is_no_restart(tmp_path):
    history = read(tmp_path, "step,loss,val_loss\n1,3,\n2,,2.9\n2,2.5,\n2,2.4,\n")
    assert column(history.train, "loss") == [3, 2.4]
    assert column(history.evals, "val_loss") == [2.9]
    assert history.notes == ()


def test_lightning(tmp_path):
    history = read(
        tmp_path,
        "epoch,step,train_loss_step,train_loss_epoch,val_loss,lr-AdamW\n"
        ",0,,,,0.001\n0,49,2.3,,,\n,50,,,,0.0009\n0,99,,,2.2,\n0,99,,2.25,,\n0,99,2.1,,,\n",
        "metrics.csv",
    )
    assert history.source == "csv"
    assert column(history.train, "step") == [49, 99]
    assert column(history.train, "loss") == [2.3, 2.1]
    assert column(history.train, "lr") == [1e-3, 9e-4]
    assert column(history.train, "epoch") == [0, 0]
    assert (column(history.evals, "step"), column(history.evals, "val_loss")) == ([99], [2.2])
    assert "lrs/AdamW was logged at other steps" in history.notes[0]


def test_lightning_by_its_folder(tmp_path):
    put(tmp_path / "logs/version_0/hparams.yaml", "{}")
    put(tmp_path / "logs/version_0/metrics.csv", "step,train_loss\n9,2.5\n19,2.4\n")
    history = read_log(tmp_path / "logs")
    assert (history.name, column(history.train, "loss")) == ("logs", [2.5, 2.4])


WANDB = (
    '"Step","a - b - train/loss","a - b - train/loss__MIN","a - b - train/loss__MAX",'
    '"second - train/loss","second - train/loss__MIN","second - train/loss__MAX"\n'
    '"0","3.1","3.0","3.2","3.3","3.3","3.3"\n"1","2.9","2.8","3.0","",""\n'
)


def test_a_chart_of_weights_and_biases(tmp_path):
    history = read(tmp_path, WANDB, "wandb_export.csv")
    assert column(history.train, "loss") == [3.1, 2.9]
    (note,) = history.notes
    assert "2 runs" in note
    assert "'a - b'" in note
    assert "'second'" in note


def test_a_chart_whose_axis_is_time(tmp_path):
    history = read(
        tmp_path,
        '"Relative Time (Process)","r - _step","r - _step__MIN","r - val/loss"\n'
        "0.5,100,100,3.0\n1.5,200,200,2.0\n",
    )
    assert column(history.evals, "step") == [100, 200]
    assert len(history.train) == 0


@pytest.mark.parametrize("comma", [";", "\t"])
def test_decimal_commas(tmp_path, comma):
    rows = [["Step", "note", "loss", "lr"], ["0", "x", "1,5", "1e-3"], ["1", "y", "1,25", "0,001"]]
    history = read(tmp_path, "\n".join(comma.join(row) for row in rows))
    assert column(history.train, "loss") == [1.5, 1.25]
    assert column(history.train, "lr") == [1e-3, 1e-3]


COMMAS = {  # delimiter, step, loss, tokens a second; and what these are
    "thousands": ("\t", ["990", "1,000"], ["4.25", "4.2"], ["74,000", "75,000"], 74_000),
    "decimals": (";", ["990", "1000"], ["4,258", "4,251"], ["512,5", "512,75"], 512.5),
    "quoted": (",", ['"990"', '"1000"'], ['"4,258"', '"4,251"'], ['"0,500"', '"1,500"'], 0.5),
    "both": (";", ["990", "1,000"], ["4,25", "4,251"], ["74,000", "1,234,567"], 74_000),
    "points": (";", ["990", "1.000"], ["4,258", "4,251"], ["74000", "75000"], 74_000),
    "as elsewhere": (";", ["990", "1000"], ["4,2", "4,1"], ["512,500", "512,750"], 512.5),
}


@pytest.mark.parametrize("name", COMMAS)
def test_what_a_comma_means_is_told_by_its_column(tmp_path, name):
    delimiter, *columns, speed = COMMAS[name]
    rows = zip(("step", "loss", "tokens_per_s"), *zip(*columns, strict=True), strict=True)
    lines = [delimiter.join(row) for row in zip(*rows, strict=True)]
    history = read(tmp_path, "\n".join(lines) + "\n")
    assert column(history.train, "step") == [990, 1000]
    losses = [float(text.strip('"').replace(",", ".")) for text in columns[1]]
    assert column(history.train, "loss") == losses
    assert history.train["tokens_per_s"][0] == speed


def test_a_download_of_tensorboard(tmp_path):
    text = "Wall time,Step,Value\n1654943296.2,0,5.9\n1654943313.7,1,5.7\n"
    validated = read(tmp_path, text, "run-x-tag-val_loss.csv")
    assert column(validated.evals, "val_loss") == [5.9, 5.7]
    unnamed = read(tmp_path, text, "numbers.csv")
    assert column(unnamed.train, "loss") == [5.9, 5.7]
    assert "taken as the training loss" in unnamed.notes[0]
    as_json = read(tmp_path, "[[1654943296.2, 0, 5.9], [1654943313.7, 1, 5.7]]")
    assert column(as_json.train, "loss") == [5.9, 5.7]


def test_a_table_with_a_comment_a_torn_line_and_a_quote_that_never_ends(tmp_path):
    history = read(
        tmp_path,
        '# a run\n# step, loss\n\n1, 3.0\n2, "2.9\n3, 2.8\nstep, loss\n4, 2.7\n5,',
        "r.csv",
    )
    assert column(history.train, "step") == [1, 2, 3, 4]
    assert column(history.train, "loss") == [3, 2.9, 2.8, 2.7]


@pytest.mark.parametrize("end", ["", "\0" * 300])
@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("", "loss {loss} lr 3e-4 step {step}"),
        ("loss,lr,epoch,step\n", "{loss},3e-4,{epoch},{step}"),
    ],
)
def test_a_last_line_that_is_cut_within_its_step(tmp_path, header, line, end):
    lines = [
        line.format(loss=5 - step / 1000, step=step, epoch=step / 1000)
        for step in range(10, 2001, 10)
    ]
    whole = header + "\n".join(lines)
    history = read(tmp_path, whole[:-2] + end)
    assert (history.last_step, len(history.train)) == (1990, 199)
    assert history.notes == (
        "the last line breaks off before the end of its step: it was left out",
    )
    assert read(tmp_path, whole).last_step == 2000
    if header:  # cut earlier, the line has a piece of its loss and no step
        shorter = read(tmp_path, whole[: whole.rindex("\n") + 2] + end)
        assert shorter.train["loss"][-1] == 5 - 1990 / 1000
        assert shorter.notes == history.notes
    again = read(tmp_path, whole[:-2] + "\n")
    assert "breaks off" not in again.notes[0], "a whole line is a restart, or an epoch"


def test_no_step_and_perplexity_only(tmp_path):
    history = read(tmp_path, "epoch,ppl,val_ppl\n1,20,30\n2,10,\n3,nan,20\n")
    assert column(history.train, "step") == [1, 2, 3]
    assert history.train["loss"][0] == pytest.approx(math.log(20))
    assert column(history.evals, "val_loss") == [round(math.log(x), 9) for x in (30, 20)]
    assert [note.split(":")[0] for note in history.notes] == [
        "the log has perplexities only",
        "the log has perplexities only",
        "no column tells the step",
    ]


def test_values_that_are_no_numbers(tmp_path):
    history = read(
        tmp_path, "step,loss,grad_norm\n1,3.0,inf\n2,NaN,-inf\n3,Infinity,\n4,-Infinity,nan\n"
    )
    assert np.array_equal(
        history.train["loss"], [3.0, math.nan, math.inf, -math.inf], equal_nan=True
    )
    assert history.train["grad_norm"][0] == math.inf
    assert history.train["grad_norm"][1] == -math.inf


def test_nan_in_place_of_an_empty_cell(tmp_path):
    history = read(tmp_path, "step,loss,val_loss\n1,3.0,nan\n2,2.0,nan\n2,nan,2.5\n3,nan,nan\n")
    assert column(history.train, "step") == [1, 2, 3]
    assert history.train["loss"][1] == 2.0
    assert math.isnan(history.train["loss"][2])  # this one diverged
    assert history.evals["val_loss"][0] == 2.5


def test_losses_of_one_line_belong_together(tmp_path):
    history = read(tmp_path, "epoch,step,loss,val_loss\n1,10,3.0,3.1\n2,20,2.0,2.6\n")
    assert column(history.evals, "train_loss") == [3.0, 2.0]


def test_a_table_without_a_loss_names_its_columns(tmp_path):
    with pytest.raises(UserError, match=r"no column is a loss.*'step'.*'accuracy'.*call one") as e:
        read(tmp_path, "step,accuracy\n1,0.5\n")
    assert len(e.value.lines) == 1


def test_json_lines_with_inner_objects_and_torn_ones(tmp_path):
    history = read(
        tmp_path,
        '{"global_step": 1, "loss": {"out": 3.0}, "optim": {"lr": 0.1, "grad_norm": "NaN"}, '
        '"speed": {"wps": 100}, "vocab_size": 300}\n'
        '{"global_step": 2, "loss": {"out": NaN}, "optim": {"lr": 0.05}, "max_steps": 10}\n'
        '{"global_step": 2, "eval": {"loss": 2.9}}\n'
        '{"global_step": 3, "loss": {"out"',
        "metrics.jsonl",
    )
    assert history.source == "jsonl"
    assert history.train["loss"][0] == 3.0
    assert math.isnan(history.train["loss"][1])
    assert column(history.train, "lr") == [0.1, 0.05]
    assert history.train["tokens_per_s"][0] == 100
    assert column(history.evals, "val_loss") == [2.9]
    assert (history.vocab_size, history.total_steps, history.finished) == (300, 10, False)


@pytest.mark.parametrize(
    "text",
    [
        '[{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, 5]',
        '[\n  {"step": 1, "loss": 3.0},\n  {"step": 2, "loss": 2.0}\n]',
        '{"step": [1, 2], "loss": [3.0, 2.0]}',
        '{\n "step": {"0": 1, "1": 2},\n "loss": {"0": 3.0, "1": 2.0}\n}',
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": "2.0"}\n',
        "[2026-10-01 12:00:01] step 1: loss 3.0\n[2026-10-01 12:00:02] step 2: loss 2.0\n",
        'INFO {"step": 1, "loss": 3.0}\nINFO {"step": 2, "loss": 2.0}\n',
    ],
)
def test_json_in_other_forms(tmp_path, text):
    history = read(tmp_path, text)
    assert column(history.train, "step") == [1, 2]
    assert column(history.train, "loss") == [3, 2]


def state(steps: int = 3, total: int = 30) -> str:
    rows: list[dict[str, float]] = [
        {
            "epoch": step / 10,
            "grad_norm": 0.5,
            "learning_rate": 1e-3,
            "loss": 4 - step,
            "step": step,
        }
        for step in range(1, steps + 1)
    ]
    rows.append({"epoch": 0.3, "eval_loss": 3.5, "eval_runtime": 1.0, "step": steps})
    rows.append({"epoch": 0.3, "train_loss": 9.9, "train_runtime": 8.0, "step": steps})
    value = {"best_metric": None, "global_step": steps, "log_history": rows, "max_steps": total}
    return json.dumps(value, indent=2)


def test_trainer_state(tmp_path):
    history = read(tmp_path, state(), "trainer_state.json")
    assert history.source == "trainer_state"
    assert column(history.train, "step") == [1, 2, 3]
    assert column(history.train, "loss") == [3, 2, 1]  # without the mean of the whole training
    assert column(history.train, "lr") == [1e-3] * 3
    assert column(history.train, "epoch") == [0.1, 0.2, 0.3]
    assert column(history.evals, "val_loss") == [3.5]
    assert (history.total_steps, history.finished) == (30, False)
    assert read(tmp_path, state(total=3), "trainer_state.json").finished


def test_trainer_state_by_its_folder_or_newest_checkpoint(tmp_path):
    for step in (2, 10):
        put(tmp_path / f"out/checkpoint-{step}/trainer_state.json", state(step))
    put(tmp_path / "out/checkpoint-last/trainer_state.json", "{}")
    history = read_log(tmp_path / "out")
    assert (history.name, history.last_step) == ("out", 10)
    put(tmp_path / "out/trainer_state.json", state(5))
    assert read_log(tmp_path / "out").last_step == 5


@pytest.fixture
def writer():
    module = pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)
    return module.SummaryWriter


def test_a_tensorboard_folder(tmp_path, writer):
    with writer(str(tmp_path / "run")) as log:
        log.add_text("config", "lr: 0.1")
        for step in (10, 20, 30):
            log.add_scalar("train/loss", 4 - step / 10, step)
            log.add_scalar("train/lr", 0.5, step, new_style=True)
            log.add_scalar("train/grad_norm", math.nan if step == 30 else 1.0, step)
        log.add_scalar("val/loss", 3.5, 30)
        log.add_histogram("weights", np.arange(5.0), 30)
    history = read_log(tmp_path / "run")
    assert (history.name, history.source) == ("run", "tensorboard")
    assert column(history.train, "step") == [10, 20, 30]
    assert column(history.train, "loss") == [3, 2, 1]
    assert column(history.train, "lr") == [0.5] * 3
    assert math.isnan(history.train["grad_norm"][2])
    assert column(history.evals, "val_loss") == [3.5]
    (file,) = (tmp_path / "run").iterdir()
    assert column(read_log(file).train, "loss") == [3, 2, 1]
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        try:
            assert column(read_log(file).train, "loss") == [3, 2, 1][: len(read_log(file).train)]
        except UserError as error:
            assert len(error.lines) == 1


def test_damaged_tensorboard_files(tmp_path, writer):
    with writer(str(tmp_path)) as log:
        for step in range(9):
            log.add_scalar("loss", 3.0, step)
    (file,) = tmp_path.iterdir()
    whole, rng = file.read_bytes(), random.Random(1)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 5)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        file.write_bytes(damaged)
        check_never_a_traceback(tmp_path)


def test_a_resumed_tensorboard_run(tmp_path, writer):
    for begin, loss in ((0, 3.0), (2, 2.0)):
        with writer(str(tmp_path), filename_suffix=f".{begin}") as log:
            for step in range(begin, begin + 4):
                log.add_scalar("loss", loss, step)
    names = sorted(file.name for file in tmp_path.iterdir())
    for number, name in enumerate(names):  # both were written in one second
        (tmp_path / name).rename(tmp_path / f"events.out.tfevents.{9 + number}.host")
    history = read_log(tmp_path)
    assert column(history.train, "loss") == [3, 3, 2, 2, 2, 2]
    assert "go back once, first to 2" in history.notes[0]


def test_one_run_in_several_folders(tmp_path, writer):
    with writer(str(tmp_path / "charts")) as log:
        for step in (1, 2):
            log.add_scalars("loss", {"train": 3.0 - step, "val": 3.5 - step}, step)
    charts = read_log(tmp_path / "charts")
    assert column(charts.train, "loss") == [2, 1]
    assert column(charts.evals, "val_loss") == [2.5, 1.5]
    for folder in ("train", "validation"):
        with writer(str(tmp_path / "keras" / folder)) as log:
            log.add_scalar("epoch_loss", 3.0, 1)
    keras = read_log(tmp_path / "keras")
    assert column(keras.train, "loss") == column(keras.evals, "val_loss") == [3]


def test_several_tensorboard_runs_are_not_mixed(tmp_path, writer):
    for name in ("version_0", "version_1"):
        with writer(str(tmp_path / name)) as log:
            log.add_scalar("train_loss", 3.0, 1)
    with pytest.raises(UserError, match="2 runs are in it; give one of version_0, version_1"):
        read_log(tmp_path)
    assert read_log(tmp_path / "version_1").name == "version_1"


def test_tensorboard_that_is_not_installed(tmp_path, writer, monkeypatch):
    with writer(str(tmp_path)) as log:
        log.add_scalar("loss", 3.0, 1)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(UserError, match=r"tensorboard, which is not installed; pip install"):
        read_log(tmp_path)


def test_what_our_own_tensorboard_log_holds_is_read_back(tmp_path, writer):
    run = tmp_path / "run"
    run.mkdir()
    layers = {"update_ratio": {"blocks.0.attn.wq.weight": 1e-3}, "rms": {"blocks.0": 2.0}}
    with MetricsLog(run, tensorboard=True) as log:
        for step in (1, 2):
            log.write(
                {"kind": "train", "step": step, "loss": 3.0 - step, "lr": 0.5, "clipped": False}
                | {"lrs": {"matrices": 0.5, "scalars": 0.25}, "slope_after": -0.5}
            )
        log.write(
            {"kind": "eval", "step": 2, "val_loss": 2.0, "val_bpb": 1.5, "train_loss": 1.5}
            | {"val_se": 0.25}
        )
        log.write({"kind": "layers", "step": 2, **layers})
    ours, foreign = read_log(run), read_log(run / "tensorboard")
    for mine, theirs in ((ours.train, foreign.train), (ours.evals, foreign.evals)):
        assert set(mine.columns) == set(theirs.columns)
        for name, values in mine.columns.items():
            assert theirs[name] == pytest.approx(values), name
    assert ours.layers.columns == foreign.layers.columns or all(
        foreign.layers[name] == pytest.approx(values)
        for name, values in ours.layers.columns.items()
    )
    assert set(ours.layers.columns) == set(foreign.layers.columns)


def test_a_run_of_ours_by_folder_file_and_copy(tmp_path):
    run = tmp_path / "mine"
    run.mkdir()
    with MetricsLog(run) as log:
        log.write({"kind": "event", "event": "run", "step": 0, "total_steps": 9, "vocab_size": 50})
        log.write({"kind": "train", "step": 1, "loss": math.nan, "lrs": {"a": 1.0}})
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((run / METRICS_NAME).read_bytes())
    for path, name in ((run, "mine"), (run / METRICS_NAME, "mine"), (copy, "copy.jsonl")):
        history = read_log(path)
        assert (history.name, history.source, history.path) == (name, "gpt-train", path) or (
            path.name == METRICS_NAME and history.path == run
        )
        assert (history.total_steps, history.vocab_size, history.finished) == (9, 50, False)
        assert math.isnan(history.train["loss"][0])
        assert column(history.train, "lrs/a") == [1]


def test_a_log_of_ours_may_be_long_and_end_in_zeros(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt.foreign.lines.MOST_BYTES", 100)
    text = "".join(f'{{"kind": "train", "step": {step}, "loss": 2.5}}\n' for step in range(1, 9))
    for name in (f"mine/{METRICS_NAME}", "copy.jsonl"):
        path = put(tmp_path / name, text + "\0" * 3000)
        assert column(read_log(path).train, "step") == list(range(1, 9))
    assert read_log(tmp_path / "mine").source == "gpt-train"
    with pytest.raises(UserError, match="are read"):
        read(tmp_path, text.replace("train", "other"))


def test_lines_in_the_form_of_ours_with_anything_in_them(tmp_path):
    lines = [
        '{"kind": "train", "loss": 1}',
        '{"kind": "train", "step": "x", "loss": 1}',
        '{"kind": "event", "event": "run", "step": [], "total_steps": "many", "vocab_size": -1}',
        f'{{"kind": "train", "step": 2, "loss": 1{"0" * 400}}}',
        '{"kind": "layers", "step": 1, "rms": ' + '{"a":' * 500 + "1" + "}" * 500 + "}",
        '{"kind": "train", "step": 1, "loss": 2.5}',
    ]
    history = read(tmp_path, "\n".join(lines) + "\n")
    assert history.train["loss"][1] == 2.5
    assert (history.total_steps, history.vocab_size) == (None, None)


def test_a_metrics_file_of_another_program_in_a_folder(tmp_path):
    put(tmp_path / "dump" / METRICS_NAME, '{"global_step": 1, "loss/out": 3.0}\n{"global_step": 2}')
    history = read_log(tmp_path / "dump")
    assert (history.name, history.source, column(history.train, "loss")) == ("dump", "jsonl", [3])


def test_folders_without_one_log(tmp_path):
    with pytest.raises(UserError, match="no log is in the folder; readable are"):
        read_log(tmp_path)
    put(tmp_path / "a.log", "step 1 loss 2")
    assert column(read_log(tmp_path).train, "loss") == [2]
    put(tmp_path / "b.csv", "step,loss\n1,2")
    with pytest.raises(UserError, match=r"2 files may be the log; give one of a\.log, b\.csv"):
        read_log(tmp_path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"\x00\x01\x02\x03" * 100, "it is binary"),
        (bytes(3000), "it is binary"),
        (bytes(range(128, 256)) * 10, "it is binary"),
        (gzip.compress(b"step 1 loss 2", mtime=0), "compressed, unpack it first"),
        (b":W&B\x00\x01\x02", "W&B's own file"),
        (b"Dear diary,\n\ntoday nothing was trained.\n", "no line in it tells a loss"),
        (b"[1, 2", "no line in it tells a loss"),
        (b'{\n  "loss": [1, 2', "it begins like JSON and is none, or breaks off"),
        (b'{"a": {}}', "no line in it tells a loss"),
        (b"step,loss\n", "no line in it tells a loss"),
    ],
)
def test_not_a_log(tmp_path, content, why):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_log(path)
    (line,) = error.value.lines
    assert line.startswith(f"{path}: not a log that can be read: ")
    assert why in line
    assert "; readable are a run directory, CSV, JSON lines" in line


def test_paths_that_are_none(tmp_path):
    with pytest.raises(UserError, match="does not exist; give a run directory"):
        read_log(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no regular file"):
        read_log(Path("/dev/null"))
    with pytest.raises(UserError, match="cannot be read"):
        read_log(tmp_path / ("x" * 5000))


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "huge.log"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(UserError, match="512 MiB, at most 512 MiB are read"):
        read_log(path)


def test_lines_of_absurd_length_are_cut(tmp_path):
    noise = "x" * (LINE_CHARACTERS + 10) + " step 7 loss 7\n"
    history = read(tmp_path, "step 1 loss 3\n" + noise + "step 2 loss 2\n")
    assert column(history.train, "loss") == [3, 2]
    wide = "step,loss," + ",".join(f"c{n}" for n in range(3000)) + "\n"
    history = read(tmp_path, wide + "".join(f"{n},{n}" + ",0" * 3000 + "\n" for n in (1, 2)))
    assert column(history.train, "loss") == [1, 2]


def test_lines_that_are_hard_to_search(tmp_path):
    for piece in (
        "loss",
        " ",
        "loss ",
        "1,111",
        "[",
        " - ",
        "a - INFO ",
        "x 1 ",
        "\x1b]",
        "a.b/c-d ",
    ):
        line = ("loss " + piece * 5000)[:5000] + " vocab_size" + "\n"
        check_never_a_traceback(put(tmp_path / "hard.log", line * 20))


def test_a_folder_of_weights_and_biases(tmp_path):
    put(tmp_path / "files/output.log", "step 1 loss 2.5\n")
    put(tmp_path / "files/requirements.txt", "torch==2.13.0\n")
    put(tmp_path / "logs/debug.log", "started\n")
    assert column(read_log(tmp_path).train, "loss") == [2.5]


def check_never_a_traceback(path: Path) -> None:
    try:
        history = read_log(path)
    except UserError as error:
        assert len(error.lines) == 1
        return
    for table in (history.train, history.evals, history.layers):
        assert len({len(values) for values in table.columns.values()}) == 1
        steps = table["step"]
        assert np.isfinite(steps).all()
        assert (np.diff(steps) > 0).all() or history.source == "gpt-train"
    assert len(history.train) + len(history.evals) or history.source == "gpt-train"
    assert history.last_step == history.last_step
    history.until(history.last_step)


@given(st.binary(max_size=300))
@settings(max_examples=150)
def test_random_bytes(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "file"
    path.write_bytes(content)
    check_never_a_traceback(path)


SIGNS = " \n\r\t\"'{}[],;:=|#-/"
WORDS = ["step", "loss", "val", "train", "lr", "epoch", "iter", "ppl", "bpb", "bar", "tok/s", "ms"]
SAMPLES = [
    NANOGPT,
    WANDB,
    state(),
    "epoch,step,train_loss,val_loss\n0,49,2.3,\n0,99,,2.2\n1,149,2.1,\n",
    '{"kind": "train", "step": 1, "loss": 2.5}\n{"kind": "eval", "step": 1, "val_loss": 2.5}\n',
    '{"step": 1, "loss": 3.0, "optim": {"lr": 1}}\n{"step": 2, "loss": 2.0}\n',
    "step    1/100 | loss 11.008 (+nanz)| norm 15.36 (+nanz)| lr 8.57e-07 | 3056.36 ms\n",
    "  7%|6  | 4/60 [00:02<00:09,  9.9it/s]\r{'loss': 3.2, 'epoch': 0.16}\n",
]


@given(st.data())
@settings(max_examples=200)
def test_damaged_logs(tmp_path_factory, data):
    text = data.draw(st.sampled_from(SAMPLES))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(at, min(len(text), at + 20)))
        piece = st.sampled_from([*SIGNS, "nan", "1e999", "-1", "step", "loss", "9" * 30])
        text = text[:at] + data.draw(piece | st.text(max_size=3)) + text[end:]
    text = text[: data.draw(st.integers(0, len(text)))]
    path = tmp_path_factory.mktemp("fuzz") / "file"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    check_never_a_traceback(path)


TOKENS = st.sampled_from([*WORDS, *SIGNS, "\x1b[31m", "1", "2.5", "nan", "3/9", "-7", "9" * 30])


@given(st.lists(TOKENS | st.floats().map(str), max_size=60))
@settings(max_examples=200)
def test_words_and_numbers_in_any_order(tmp_path_factory, words):
    path = tmp_path_factory.mktemp("fuzz") / "file"
    path.write_text(" ".join(words), encoding="utf-8")
    check_never_a_traceback(path)


KEYS = st.sampled_from([*WORDS, "kind", "log_history", "max_steps"])
LEAVES = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3)
VALUES = st.recursive(
    LEAVES | st.sampled_from(["train", "eval", "event", "NaN"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(KEYS, VALUES, max_size=4) | VALUES, max_size=4), st.booleans())
@settings(max_examples=150)
def test_any_json(tmp_path_factory, values, in_lines):
    path = tmp_path_factory.mktemp("fuzz") / "file"
    text = "\n".join(map(json.dumps, values)) + "\n" if in_lines else json.dumps(values)
    path.write_text(text, encoding="utf-8")
    check_never_a_traceback(path)
