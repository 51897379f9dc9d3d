"""Test 13: broken numbers anywhere, once, in a row, or without end."""

import json
import math
import random
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gpt.checkpoint import Training
from gpt.config import Config
from gpt.metrics import Record, read_metrics
from gpt.plan import Plan
from gpt.rundir import checkpoint_folders, run_path
from tests.conftest import tiny_config
from tests.torture import Torture
from tests.torture.runs import Command, check_same, check_tidy, write_config

WHERE = ("gradient", "loss", "data", "activation", "weights", "state", "evaluation")
VALUES = (math.nan, math.inf, -math.inf, 1e30, 1e38, 1e-42)
HOW_OFTEN = ("once", "in a row", "too often")
OPTIMIZERS = ("sgd", "adam", "adamw", "adafactor", "muon")
DTYPES = ("fp32", "bf16", "fp16")
STEPS, SKIP_LIMIT, MICRO_BATCHES, PATIENCE = 48, 3, 3, 3
SAVE_EVERY, EVAL_EVERY = 10, 6
BROKEN_FOR_GOOD = ("weights", "state")  # memory that goes bad once; the rest is of some batches


def make_config(shared: Path, folder: Path, index: int, rng: random.Random) -> Config:
    """A run in which every choice that broken numbers could meet is drawn."""
    optimizer = OPTIMIZERS[index % len(OPTIMIZERS)]
    return tiny_config(
        shared,
        run__dir=str(folder),
        optimizer__name=optimizer,
        optimizer__lr="1e-2",
        optimizer__weight_decay=rng.choice(["0", "0.1"]),
        model__init=rng.choice(["gpt2", "zero_proj"]),
        model__dropout=rng.choice(["0.0", "0.2"]),
        train__max_steps=str(STEPS),
        train__batch_size="6",
        train__micro_batch_size=str(6 // MICRO_BATCHES),
        train__dtype=DTYPES[(index // len(OPTIMIZERS)) % len(DTYPES)],
        train__device="cpu",
        train__skip_limit=str(SKIP_LIMIT),
        train__spike_sigma=rng.choice(["null", "6"]),
        train__grad_clip=rng.choice(["null", "1.0"]),
        eval__every_steps=str(EVAL_EVERY),
        eval__sample_tokens="3",
        eval__patience=str(PATIENCE) if WHERE[index % len(WHERE)] == "evaluation" else "null",
        checkpoint__every_steps=str(SAVE_EVERY),
        checkpoint__keep="2",
        log__every_steps=rng.choice(["1", "3"]),
    )


def make_fault(index: int, rng: random.Random, optimizer: str) -> dict[str, Any]:
    """What breaks: `at` is of batches, or for an evaluation of steps."""
    where = WHERE[index % len(WHERE)]
    often = HOW_OFTEN[index // (len(WHERE) * len(VALUES)) % len(HOW_OFTEN)]
    count = {"once": 1, "in a row": rng.randint(2, SKIP_LIMIT), "too often": SKIP_LIMIT + 1}[often]
    first = rng.choice(
        [0, STEPS - 1, SAVE_EVERY - 1, SAVE_EVERY, EVAL_EVERY - 1, rng.randrange(STEPS)]
    )
    at = list(range(first, first + count))
    if where == "evaluation":
        first = rng.choice([EVAL_EVERY, STEPS, EVAL_EVERY * rng.randint(1, STEPS // EVAL_EVERY)])
        at = [first + EVAL_EVERY * i for i in range(count)]
    return {
        "where": where,
        "value": VALUES[index // len(WHERE) % len(VALUES)],
        "at": at,
        "micro_batch": rng.randrange(MICRO_BATCHES),
        "draw": rng.random(),  # which parameter, element, row
        "stop_at": rng.choice([None, first + 1, first, first - 1, rng.randrange(1, STEPS)]),
    }


def inject(folder: Path) -> None:
    """In the command's process: breaks what fault.json says, and looks at all weights."""
    import gpt.train

    fault = json.loads((folder / "fault.json").read_text())
    if fault["draw"] > 0.2:  # the rest read their log, and draw it
        gpt.train.report = lambda *_: None  # type: ignore[assignment]
    Injector(folder, fault).install()


class Injector:
    """Breaks one thing at some batches, and notes where weights were not finite after a step."""

    def __init__(self, folder: Path, fault: dict[str, Any]) -> None:
        self.folder, self.fault = folder, fault
        self.value: float = fault["value"]
        self.batch = -1  # the one that is worked on
        self.micro_batch = 0
        self.row: Tensor | None = None  # the sequence that gives broken numbers

    def install(self) -> None:
        """Puts itself into the training loop's parts."""
        import gpt.step
        import gpt.train
        from gpt.batches import Batches

        whole, loss_of, evaluate = Batches.batch, gpt.step.cross_entropy_sum, gpt.train.evaluate
        step, injector, hooked = gpt.train.train_step, self, []

        def batch(batches: Batches, number: int, rows: slice | None = None) -> Any:
            inputs, targets = whole(batches, number, rows)
            self.batch, self.micro_batch = number, 0
            if self.is_at("data"):
                self.row = inputs[int(self.fault["draw"] * len(inputs))].clone()
            return inputs, targets

        def train_step(training: Training, *batch: Tensor, **more: Any) -> Any:
            if not hooked:
                hooked.append(injector.hook(training.model))
            injector.break_memory(training)
            injector.micro_batch = 0
            try:
                return step(training, *batch, **more)
            finally:
                injector.look(training)

        def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
            loss = loss_of(logits, targets)
            if torch.is_grad_enabled():
                at = self.is_at("loss") and self.micro_batch == self.fault["micro_batch"]
                self.micro_batch += 1
                self.note(at)
                if at and self.fault["draw"] < 0.5:
                    return loss + self.value  # its gradient stays as it was
                return loss * self.value if at else loss
            return loss

        def evaluation(training: Training, *rest: Any) -> Any:
            result = evaluate(training, *rest)
            broken = self.fault["where"] == "evaluation"
            if broken and result is not None and training.progress.step in self.fault["at"]:
                self.note()
                return type(result)(self.value, self.value, result.tokens, None)
            return result

        Batches.batch = batch  # type: ignore[method-assign]
        gpt.train.train_step = train_step  # type: ignore[assignment]
        gpt.step.cross_entropy_sum = loss_sum
        gpt.train.evaluate = evaluation  # type: ignore[assignment]
        self.request_stop()

    def request_stop(self) -> None:
        """Has the run stopped, once, as by SIGTERM, before a step."""
        import gpt.train

        once = gpt.train.step_once
        mark = self.folder / "stopped"

        def step_once(run: Path, training: Training, *rest: Any) -> None:
            if training.progress.step == self.fault["stop_at"] and not mark.exists():
                import signal

                mark.touch()
                signal.raise_signal(signal.SIGTERM)
            once(run, training, *rest)

        gpt.train.step_once = step_once  # type: ignore[assignment]

    def note(self, broke: bool = True) -> None:
        """Notes that something was broken: a fault that never came proves nothing."""
        if broke:
            (self.folder / "broke").touch()

    def is_at(self, where: str) -> bool:
        """Whether this is the place and the batch."""
        return self.fault["where"] == where and self.batch in self.fault["at"]

    def hook(self, model: nn.Module) -> None:
        """Gradients, activations and sequences break inside of the model."""
        parameters, whole = list(model.parameters()), model.embed
        chosen = parameters[int(self.fault["draw"] * len(parameters))]

        def gradient(parameter: Tensor) -> None:
            if self.is_at("gradient") and self.micro_batch - 1 == self.fault["micro_batch"]:
                assert parameter.grad is not None
                self.note()
                parameter.grad.view(-1)[self.place(parameter)] = self.value

        def activation(module: nn.Module, _inputs: Any, out: Tensor) -> Tensor | None:
            at = self.is_at("activation") and self.micro_batch == self.fault["micro_batch"]
            if not (at and module.training):
                return None
            self.note()
            out = out.clone()
            out.view(-1)[self.place(out)] = self.value
            return out

        def embed(ids: Tensor, *rest: Any) -> Tensor:
            out = whole(ids, *rest)
            if not self.is_at("data") or self.row is None:
                return out
            same = (ids == self.row).all(1)
            self.note(bool(same.any()))
            return torch.where(same[:, None, None], self.value, out)

        chosen.register_post_accumulate_grad_hook(gradient)
        blocks = list(model.blocks)  # type: ignore[arg-type]
        blocks[int(self.fault["draw"] * len(blocks))].register_forward_hook(activation)
        model.embed = embed  # type: ignore[assignment]

    def place(self, tensor: Tensor) -> int:
        """Which element."""
        return int(self.fault["draw"] * tensor.numel())

    def break_memory(self, training: Training) -> None:
        """A weight, or a number of the optimizer's state, goes bad, once in all processes."""
        mark = self.folder / "broken"
        if self.fault["where"] not in BROKEN_FOR_GOOD or mark.exists():
            return
        if self.batch not in self.fault["at"]:
            return
        tensors: list[Tensor] = [p.data for p in training.model.parameters()]
        if self.fault["where"] == "state":
            states = training.optimizer.state.values()
            tensors = [
                v for s in states for v in s.values() if isinstance(v, Tensor) and v.dim() > 0
            ]
        if tensors:
            tensor = tensors[int(self.fault["draw"] * len(tensors))]
            tensor.view(-1)[self.place(tensor)] = self.value
            mark.touch()
            self.note()

    def look(self, training: Training) -> None:
        """Notes weights that are not finite."""
        if not all(bool(torch.isfinite(p).all()) for p in training.model.parameters()):
            with (self.folder / "weights").open("a") as file:
                file.write(f"step {training.progress.step}, batch {self.batch}\n")


def train(argv: list[str], folder: Path) -> Command:
    """A command whose numbers break."""
    command = Command(argv, folder, patch=inject)
    command.wait()
    return command


def case(index: int, rng: random.Random, folder: Path) -> str:
    """One fault: the run passes over it, or stops as it promised to, and can go on."""
    shared = folder.parent
    config = make_config(shared, folder, index, rng)
    fault = make_fault(index, rng, config.optimizer.name)
    (folder / "fault.json").write_text(json.dumps(fault))
    argv = ["gpt-train", "--config", str(write_config(config, folder))]
    ended = train(argv, folder)
    if ended.process.exitcode == 143:
        ended = train(argv, folder)
    run = run_path(config)
    code, said = ended.process.exitcode, ended.said
    assert code in (0, 2), f"exit code {code}:\n{said[-3000:]}"
    assert "Traceback" not in said, said[-3000:]
    check_finite(run)
    check_tidy(config)
    records = read_metrics(run)
    check_records(config, records)
    where = fault["where"]
    stateless = where == "state" and config.optimizer.name == "sgd"
    assert stateless or (folder / "broke").exists(), "the fault never came"
    if where not in BROKEN_FOR_GOOD:
        assert not (folder / "weights").exists(), (folder / "weights").read_text()
    if where == "evaluation":
        return check_evaluation(config, fault, records, code)
    if where not in BROKEN_FOR_GOOD:
        check_skips(config, fault, records, code)
        if (folder / "stopped").exists() and code == 0:
            check_like_whole(shared, index, config, fault, folder)
    if code == 0:
        passed = any(record.get("event") == "nonfinite" for record in records)
        return f"{where}: {'passed over' if passed else 'taken, all finite'}"
    go_on(folder, config, said, records)
    return f"{where}: stopped, and went on by its own advice"


def check_finite(run: Path) -> None:
    """Asserts that no checkpoint holds a number that is not finite."""
    for checkpoint in checkpoint_folders(run):
        for name in ("model", "optimizer"):
            for key, tensor in load_file(checkpoint / f"{name}.safetensors").items():
                assert bool(torch.isfinite(tensor.float()).all()), f"{checkpoint.name}: {key}"
        state = json.loads((checkpoint / "state.json").read_text())
        best = state["progress"]["best_val_loss"]
        assert best is None or math.isfinite(best), f"{checkpoint.name}: best val loss {best}"


def steps_of(records: list[Record]) -> Iterator[Record]:
    """The lines of steps."""
    return (record for record in records if record["kind"] == "train")


def check_records(config: Config, records: list[Record]) -> None:
    """Asserts what holds of every log: a step once, its rate by the closed form, finite numbers."""
    lines = list(steps_of(records))
    numbers = [line["step"] for line in lines]
    assert numbers == sorted(set(numbers)), "a step stands in the log twice"
    total = config.train.max_steps or 0
    plan = Plan.from_config(config, total)
    for line in lines:
        expected = plan.rate(line["step"] - 1, config.optimizer.lr)
        assert math.isclose(line["lr"], expected, rel_tol=1e-9), "a skipped step moved the rate"
        assert math.isfinite(line["loss"]), line
        assert math.isfinite(line["grad_norm"]), line
        assert line["tokens"] == line["step"] * config.tokens_per_step


def check_skips(config: Config, fault: dict[str, Any], records: list[Record], code: int) -> None:
    """Asserts that exactly the broken batches were passed over, and when the run stopped."""
    skipped = [record for record in records if record.get("event") == "nonfinite"]
    batches = [record["batch"] for record in skipped]
    assert set(batches) <= set(fault["at"]), f"passed over {batches} of {fault['at']}"
    assert batches == sorted(set(batches)), "a batch was passed over twice"
    surely = not math.isfinite(fault["value"]) and fault["where"] != "activation"
    met = [i for i in fault["at"] if i < STEPS + len(batches)]
    if surely and code == 0:
        assert batches == met, f"passed over {batches} of {met}"
    if fault["value"] == 1e-42:
        assert not batches
    assert (code == 2) == (len(batches) > SKIP_LIMIT), f"{len(batches)} passed over, exit {code}"
    if code == 2:
        assert any(record.get("event") == "diverged" for record in records)
    else:
        last = list(steps_of(records))[-1]
        assert last["step"] == STEPS
        spikes = sum(record.get("event") == "spike_skipped" for record in records)
        told = sum(line["skipped"] for line in steps_of(records))
        assert told == len(batches) + spikes, f"the lines tell of {told} skipped"


def check_like_whole(
    shared: Path, index: int, config: Config, fault: dict[str, Any], folder: Path
) -> None:
    """Asserts that the run that was stopped on the way is the run that was not."""
    whole_folder = folder / "whole"
    whole_folder.mkdir()
    (whole_folder / "fault.json").write_text(json.dumps(fault | {"stop_at": None}))
    changed = config.model_dump(mode="json")
    changed["run"]["dir"] = str(whole_folder)
    whole = Config.model_validate(changed)
    argv = ["gpt-train", "--config", str(write_config(whole, whole_folder))]
    assert train(argv, whole_folder).process.exitcode == 0
    check_same(whole, config)


def check_evaluation(
    config: Config, fault: dict[str, Any], records: list[Record], code: int
) -> str:
    """Asserts that a broken evaluation is never the best, and that patience counts it."""
    assert code == 0
    evals = [record for record in records if record["kind"] == "eval"]
    waited, best = 0, math.inf
    for line in evals:
        better = math.isfinite(line["val_loss"]) and line["val_loss"] < best
        best, waited = (line["val_loss"], 0) if better else (best, waited + 1)
        assert waited < PATIENCE or line is evals[-1], "patience came too late"
    assert waited == PATIENCE or evals[-1]["step"] == STEPS, "patience came too early"
    state = json.loads((checkpoint_folders(run_path(config))[-1] / "state.json").read_text())
    found = state["progress"]["best_val_loss"]
    assert found == (best if math.isfinite(best) else None), f"best is {found}, not {best}"
    return "evaluation: " + ("patience ended it" if waited == PATIENCE else "never the best")


def go_on(folder: Path, config: Config, said: str, records: list[Record]) -> None:
    """Types what the last line says; the numbers break again where the batches make them."""
    line = said.strip().splitlines()[-1]
    assert line.startswith("error: train: "), line
    diverged = [record for record in records if record.get("event") == "diverged"][-1]
    command = line.partition("Go on with: ")[2]
    assert command.startswith("gpt-train --config"), line
    fault = json.loads((folder / "fault.json").read_text()) | {"stop_at": None}
    if diverged["cause"] == "overflow":  # another number format would not have it
        fault["at"] = []
    (folder / "fault.json").write_text(json.dumps(fault))
    again = train(shlex.split(command), folder)
    assert again.process.exitcode == 0, f"{command}\n{again.said[-3000:]}"
    for run in folder.iterdir():
        if (run / "checkpoints").is_dir():
            check_finite(run)


TORTURE = Torture(
    title="NaN, inf, 1e30, 1e38 and denormals in gradients, losses, data, activations, weights, "
    "optimizer state and evaluations; once, in a row, too often; stopped and resumed",
    promise="weights finite after every step and in every checkpoint; skipped, counted and stopped "
    "as configured; the rate does not move; the error's own command goes on",
    full=len(WHERE) * len(VALUES) * len(HOW_OFTEN),
    short=len(WHERE),
    case=case,
)
