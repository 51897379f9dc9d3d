"""The lessons: the numbers behind each picture, the pictures, and the command."""

import dataclasses
import math
import re
import struct
from importlib import import_module
from pathlib import Path

import pytest
import torch

from gpt.errors import UserError
from gpt.lr import lessons
from gpt.lr.lessons import (
    batch,
    decay,
    landscape,
    one_step,
    optimizers,
    picture,
    regimes,
    schedules,
    side_by_side,
    tiny,
    update_rule,
    warmup,
)
from gpt.lr.lessons.words import Language
from tests.test_contract import command

# Each lesson at a size that takes a second; the numbers that tests need are all there.
SMALL = {
    "update-rule": {},
    "one-step": {},
    "regimes": {"n_steps": 12, "rates": (1e-4, 1e-2, 3.0)},
    "landscape": {"n_steps": 60, "grid": 5, "val_tokens": 256},
    "optimizers": {"n_steps": 4, "ravine_steps": 180, "n_rates": 2},
    "decay": {"n_steps": 1000, "n_weights": 80, "gpt_steps": 20},
    "schedules": {"total_steps": 2000, "warmup_steps": 100, "shape_steps": 100},
    "warmup": {"n_steps": 8, "rates": (2e-3, 4e-3), "seeds": (1,)},
    "batch": {
        "samples": 4096,
        "batches": (32, 128),
        "n_copies": 24,
        "sequences": 32,
        "gpt_batches": (4, 8),
        "seeds": (1,),
    },
}
MODULES = {name: import_module(f"gpt.lr.lessons.{name.replace('-', '_')}") for name in SMALL}


@pytest.fixture(scope="module")
def numbers() -> dict[str, object]:
    """Every lesson's numbers, measured once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "GPT_RATES", {"sgd": (0.04, 0.08), "adam": (1e-3, 4e-3)})
        patch.setattr(optimizers, "RAVINE_RATES", optimizers.RAVINE_RATES[::2])
        patch.setattr(batch, "ADAM_RATES", batch.ADAM_RATES[2:])
        return {name: MODULES[name].measure(**settings) for name, settings in SMALL.items()}


@pytest.fixture
def small_lessons(numbers, monkeypatch) -> None:
    """The command teaches from numbers that are measured already."""
    for name, module in MODULES.items():
        monkeypatch.setattr(module, "measure", lambda name=name: numbers[name])


def test_every_lesson_is_tested_here():
    assert list(SMALL) == list(lessons.LESSONS)


def test_numbers_are_frozen(numbers):
    for found in numbers.values():
        field = dataclasses.fields(found)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(found, field, 0)


def test_update_rule_is_the_chapters(numbers):
    found: update_rule.UpdateRule = numbers["update-rule"]
    assert found.gradient == pytest.approx(-0.4, abs=1e-15)
    for value in (found.by_hand, found.by_autograd, found.by_sgd):
        assert value == pytest.approx(0.94, abs=1e-15)
    assert [path[1] for path in found.paths.values()] == pytest.approx([0.94, 0.904, 0.9004])
    # Closed form: the distance to the minimum shrinks by 1 - lr each step.
    for rate, path in found.paths.items():
        assert path[-1] == pytest.approx(1.3 - 0.4 * (1 - rate) ** (len(path) - 1), abs=1e-12)


def test_one_step_starts_at_chance_and_moves_by_lr(numbers):
    found: one_step.OneStep = numbers["one-step"]
    assert found.vocab_size == 257
    assert found.loss == pytest.approx(math.log(257), rel=0.01)
    moved = (found.after - found.before).abs()
    assert float(moved.max()) < 1.01e-4
    assert float(moved.median()) == pytest.approx(1e-4, rel=0.01)
    assert torch.equal((found.after - found.before).sign(), -found.gradient.sign())


def test_adams_first_step_is_lr_until_the_gradient_nears_eps(numbers):
    found: one_step.OneStep = numbers["one-step"]
    assert [step.scale for step in found.scaled] == [1.0, 1e-3, 1e-6, 1e-9]
    for step in found.scaled:
        for name in ("Wq", "head"):
            gradient, move = step.gradients[name], step.moves[name]
            assert torch.allclose(move, gradient / (gradient + 1e-8), rtol=1e-6, atol=1e-12)
    whole, last = found.scaled[0], found.scaled[-1]
    assert float(whole.moves["head"].median()) == pytest.approx(1, abs=1e-3)
    assert float(last.moves["head"].median()) < 1e-3
    assert one_step.expected_move(-1.7941e-9) == pytest.approx(0.152, abs=1e-3)


@pytest.mark.parametrize("curvature", [0.5, 2.0, 8.0])
def test_stability_limit_is_two_over_curvature(numbers, curvature):
    found: regimes.Regimes = numbers["regimes"]
    assert found.limits[curvature] == pytest.approx(2 / curvature, rel=1e-4)


def test_regimes_on_quadratic_and_gpt(numbers):
    found: regimes.Regimes = numbers["regimes"]
    for rate, path in found.paths.items():
        assert path[-1] == pytest.approx(-((1 - 2 * rate) ** (len(path) - 1)), rel=1e-9)
    small, right, large = found.runs.values()
    assert found.best == 1e-2
    assert right.val_loss < small.val_loss < found.chance < large.val_loss
    assert small.losses[0] == right.losses[0] == large.losses[0]


def test_landscape_has_the_trained_model_at_its_centre(numbers):
    found: landscape.Landscape = numbers["landscape"]
    plane = found.random
    assert plane.xs[2] == plane.ys[2] == 0
    assert float(plane.losses[2, 2]) == pytest.approx(found.trained_loss, abs=1e-6)
    assert found.trained_loss < float(plane.rim.min())
    assert found.trained_loss < found.first_loss


def test_landscape_path_ends_at_the_origin(numbers):
    found: landscape.Landscape = numbers["landscape"]
    assert found.path[-1].tolist() == pytest.approx([0, 0], abs=1e-6)
    along, across = found.shares
    assert 0.5 < along <= 1
    assert 0 <= across <= 1 - along + 1e-6
    plane = found.principal
    row, column = plane.ys.tolist().index(0), plane.xs.tolist().index(0)
    assert float(plane.losses[row, column]) == pytest.approx(found.trained_loss, abs=1e-6)
    for axis, grid in enumerate((plane.xs, plane.ys)):
        assert grid[0] <= found.path[:, axis].min()
        assert grid[-1] >= found.path[:, axis].max()


def test_random_directions_have_the_length_of_each_filter():
    model = tiny.build_tiny(tiny.tiny_config(one_step.ADAMW, 1)).model
    flat = landscape.random_direction(model, torch.Generator().manual_seed(0))
    torch.nn.utils.vector_to_parameters(flat, (twin := tiny.GPT(model.config, 257)).parameters())
    for weight, direction in zip(model.parameters(), twin.parameters(), strict=True):
        if weight.ndim < 2:
            assert not direction.any()
        else:
            assert torch.allclose(direction.norm(dim=1), weight.norm(dim=1), rtol=1e-5)


def test_principal_axes_find_a_flat_path():
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(40, 2, generator=generator)).Q.T
    path = torch.randn(9, 2, generator=generator) * torch.tensor([3.0, 1.0])
    found, coordinates, shares = landscape.principal_axes(path @ axes)
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(coordinates @ found, (path - path[-1]) @ axes, atol=1e-5)


def test_optimizers_on_the_ravine(numbers):
    found: optimizers.Optimizers = numbers["optimizers"]
    steps = {name: descent.steps[descent.best] for name, descent in found.ravine.items()}
    assert steps["SGD"] > 1.5 * steps["SGD + momentum"]
    assert found.ravine["Adam"].width > 10 * found.ravine["SGD"].width
    assert max(found.ravine["SGD"].steps) < 2 / optimizers.CONDITION  # the limit of lesson regimes
    assert found.adamw_gap == 0, "without decay, AdamW is Adam"
    for descent in found.ravine.values():
        last = descent.steps[descent.best]
        assert max(descent.losses[last:]) < optimizers.REACHED * descent.losses[0]
        assert descent.losses[last - 1] >= optimizers.REACHED * descent.losses[0]


def test_optimizers_on_the_gpt(numbers):
    found: optimizers.Optimizers = numbers["optimizers"]
    for name, runs in found.runs.items():
        assert len(runs) == 2
        assert all(len(run.losses) == 4 for run in runs.values())
        assert found.loss(name) == min(run.val_loss for run in runs.values())


def test_decoupled_decay_ignores_the_gradient_and_coupled_does_not(numbers):
    found: decay.Decay = numbers["decay"]
    expected = (1 - 1e-3 * 0.1) ** 1000
    assert found.decoupled == pytest.approx(expected)
    assert found.left["AdamW"] == pytest.approx([expected] * 5, abs=0.015)
    assert found.left["SGD"][:3] == pytest.approx([expected] * 3, abs=1e-3)
    adam = found.left["Adam"]
    assert list(adam) == sorted(adam)
    assert adam[0] < 0.4
    assert adam[-1] > 0.97


def test_decay_of_embeddings_that_never_occur(numbers):
    found: decay.Decay = numbers["decay"]
    unseen = found.counts == 0
    assert unseen[0]  # a NUL byte is in no source file
    assert int(found.counts.sum()) == 20 * 16 * 32
    left = found.rows["AdamW"][unseen]
    assert torch.allclose(left, torch.full_like(left, (1 - 1e-4) ** 20), rtol=1e-4)
    assert found.unseen("Adam") < 0.5


def test_schedules_keep_to_their_closed_form(numbers):
    found: schedules.Schedules = numbers["schedules"]
    assert len(found.shapes) == 9
    assert found.gap < 1e-12
    for name, rates in found.shapes.items():
        assert rates[10] == 1, name
        plan = schedules.shape_plan(name, 100)
        assert rates[57] == pytest.approx(plan.factor(57), abs=1e-12)


def test_chapter_misses_its_floor_and_climbs_again(numbers):
    found: schedules.Schedules = numbers["schedules"]
    cosine = 1e-5 + 2.9e-4 * (1 + math.cos(math.pi * (1999 - 100) / 2000)) / 2
    assert found.last_written == pytest.approx(cosine, rel=1e-9)
    assert found.last_written > 1.1e-5
    assert found.lowest_step == 100 + 2000
    assert found.written[100 + 2 * 2000] == pytest.approx(3e-4, rel=1e-9)
    assert found.corrected[-1] == pytest.approx(1e-5, rel=1e-9)


def test_chapters_own_numbers():
    assert schedules.last_rate(100_000) == pytest.approx(1.00725e-5, rel=1e-4)
    assert schedules.last_rate(2_000) == pytest.approx(1.5523e-4, rel=1e-4)


def test_warmup_runs_differ_in_the_warmup_alone(numbers):
    found: warmup.Warmup = numbers["warmup"]
    assert found.warmup_steps == 2
    for rate, (cold,) in found.without.items():
        (warm,) = found.warmed[rate]
        assert cold.losses[0] == warm.losses[0]
        assert cold.losses[2] < warm.losses[2]  # its first steps were ten times as long
        assert found.loss(True, rate) == warm.val_loss


def test_linear_rule_for_sgd_and_root_for_adam_on_the_quadratic(numbers):
    found: batch.Batch = numbers["batch"]
    assert found.exponent("sgd") == pytest.approx(1, abs=0.1)
    assert found.exponent("adam") == pytest.approx(0.5, abs=0.1)


def test_expected_losses_are_those_of_torchs_sgd():
    rates = batch.SGD_RATES[8:36:8]
    exact = batch.expected_losses(16, 1024)
    seen = batch.simulated_losses("sgd", 16, 1024, 2000, rates)
    assert [seen[rate] for rate in rates] == pytest.approx([exact[rate] for rate in rates], rel=0.1)


def test_vertex():
    rates = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    bowl = {rate: math.log(rate / 3.3e-3) ** 2 for rate in rates}
    assert batch.vertex(bowl) == pytest.approx(3.3e-3)
    assert batch.vertex({rate: rate for rate in rates}) == 1e-3
    assert batch.vertex(bowl | {8e-3: math.inf}) == pytest.approx(3.3e-3)
    assert batch.vertex({1e-3: 2.0, 2e-3: 1.0, 4e-3: math.inf}) == 2e-3


def test_batches_see_the_same_amount_of_text(numbers):
    found: batch.Batch = numbers["batch"]
    for by_batch in found.runs.values():
        for size, by_rate in by_batch.items():
            assert all(len(run.losses) * size == 32 for (run,) in by_rate.values())
    assert list(found.at_same_ratio("sgd", 0.01)) == [0.04, 0.08]


def test_tiny_runs_repeat_and_leave_no_trace():
    config = tiny.tiny_config(one_step.ADAMW, 3)
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    assert tiny.run_tiny(config) == tiny.run_tiny(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_a_broken_run_has_an_infinite_loss():
    config = tiny.tiny_config(optimizers.GPT["SGD"][0].model_copy(update={"lr": 1e3}), 30)
    run = tiny.run_tiny(config)
    assert run.val_loss == math.inf
    assert len(run.losses) < 30


def test_processes_give_the_same_runs(monkeypatch):
    configs = [tiny.tiny_config(one_step.ADAMW, 2, seed=seed) for seed in (1, 2)]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    together = side_by_side.run_all(configs, "test")
    assert together == [tiny.run_tiny(config) for config in configs]


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


@pytest.mark.usefixtures("small_lessons")
def test_command_teaches_all_in_order(tmp_path):
    ended = command("gpt-lr", "lessons", "--out", str(tmp_path / "out"))
    assert ended.returncode == 0, ended.stderr
    pictures = {f"{name}.png" for name in lessons.LESSONS}
    assert {path.name for path in (tmp_path / "out").iterdir()} == pictures
    for name in pictures:
        width, height = png_size(tmp_path / "out" / name)
        assert width >= 1400
        assert height >= 500
        assert (tmp_path / "out" / name).stat().st_size > 20_000
    places = [ended.stdout.index(f"{name}: ") for name in lessons.LESSONS]
    assert places == sorted(places)
    for number in ("0.94", "17.1", "17.7.3", "ln 257", "2/λ"):
        assert number in ended.stdout
    assert "lesson 9/9" in ended.stderr


@pytest.mark.usefixtures("small_lessons")
@pytest.mark.parametrize("name", lessons.LESSONS)
def test_both_languages_print_the_same_numbers(name, numbers):
    en, zh = (" ".join(MODULES[name].explain(numbers[name], lang)) for lang in ("en", "zh"))
    assert any("一" <= character <= "鿿" for character in zh)
    assert not any("一" <= character <= "鿿" for character in en)
    in_en, in_zh = (sorted(re.findall(r"\d+\.\d+(?:e[-+]\d+)?", text)) for text in (en, zh))
    assert in_en == in_zh
    assert len(in_en) >= 5


@pytest.mark.usefixtures("small_lessons")
def test_command_in_chinese_without_a_font(tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "CHINESE_FONTS", ("No Such Font",))
    ended = command("gpt-lr", "lessons", "decay", "--language", "zh", "--out", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert "耦合" in ended.stdout
    assert "中文字体" in ended.stderr
    assert (tmp_path / "decay.png").exists()


def test_a_font_without_the_glyphs_is_not_taken(monkeypatch):
    installed = "DejaVu Sans"  # comes with matplotlib
    monkeypatch.setattr(picture, "CHINESE_FONTS", ("No Such Font", installed))
    assert picture.chinese_font() is None
    assert picture.label_language("zh") == "en"
    monkeypatch.setattr(picture, "_PROBE", "abc")
    assert picture.chinese_font() == installed
    assert picture.label_language("zh") == "zh"


LANGUAGES: tuple[Language, ...] = ("en", "zh")


@pytest.mark.parametrize("name", lessons.LESSONS)
def test_pictures_say_what_they_show(name, numbers):
    for language in LANGUAGES:
        figure = MODULES[name].draw(numbers[name], language)
        titles = [axes.get_title() for axes in figure.axes]
        assert sum(map(bool, titles)) >= 2, titles
        assert any(axes.lines or axes.collections for axes in figure.axes)


def test_pictures_draw_the_numbers(numbers):
    found: schedules.Schedules = numbers["schedules"]
    figure = schedules.draw(found, "en")
    for axes, (name, rates) in zip(figure.axes[:9], found.shapes.items(), strict=True):
        assert axes.get_title() == name
        assert axes.lines[0].get_ydata().tolist() == list(rates)
    path = numbers["landscape"].path
    drawn = landscape.draw(numbers["landscape"], "en").axes[1].lines[0]
    assert torch.equal(torch.as_tensor(drawn.get_xdata()), path[:, 0])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("landscap",), "did you mean landscape?"),
        (("nothing",), "update-rule, one-step"),
        (("decay", "--language", "fr"), "en (English) or zh"),
        (("decay", "--optimizer.lr", "1"), "reads no config"),
    ],
)
def test_mistakes_are_one_line(arguments, named, tmp_path):
    ended = command("gpt-lr", "lessons", *arguments, cwd=tmp_path)
    assert ended.returncode == 2
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert named in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    ended = command("gpt-lr", "lessons", "update-rule", "--out", str(tmp_path / "file"))
    assert ended.returncode == 2
    assert "--out" in ended.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_help_lists_the_lessons():
    shown = command("gpt-lr", "lessons", "--help").stdout
    for name, lesson in lessons.LESSONS.items():
        assert name in shown
        assert lesson.section in shown


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(path: Path, content: bytes) -> None:
        path.with_name(f".tmp-{path.name}").write_bytes(content[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(picture, "write_durably", interrupted)
    with pytest.raises(KeyboardInterrupt):
        picture.save_picture(picture.new_figure(2, 2), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_vanished_is_the_users_business(tmp_path):
    with pytest.raises(UserError, match="--out"):
        picture.save_picture(picture.new_figure(2, 2), tmp_path / "gone" / "x.png")
