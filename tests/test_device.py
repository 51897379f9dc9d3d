"""Choices of device, dtype and compile, with their reasons; seeds, threads, measurements."""

import os
import subprocess
import sys
import types
import warnings
from contextlib import nullcontext

import pytest
import torch

from gpt import device as module
from gpt.device import (
    autocast,
    busy_warning,
    cpu_has_bf16,
    grad_scaler,
    keep_compiled,
    peak_memory_bytes,
    physical_cores,
    pick_compile,
    pick_device,
    pick_dtype,
    rng_state,
    seed_everything,
    set_rng_state,
    set_threads,
    synchronize,
)
from gpt.errors import UserError

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
MPS = torch.device("mps")


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    current = [1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: current.__setitem__(0, device.index)
    )


def test_auto_takes_the_cpu_where_there_is_nothing_else(no_accelerator):
    assert pick_device("auto") == CPU
    assert pick_device("cpu") == CPU


def test_auto_takes_what_is_there(two_gpus, monkeypatch):
    assert pick_device("auto") == torch.device("cuda", 1)
    assert pick_device("cuda") == torch.device("cuda", 1)
    assert pick_device("cuda:0") == CUDA
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == MPS


def test_the_gpu_that_was_asked_for_becomes_the_current_one(two_gpus):
    """Whose generator is saved, and which is asked for bf16."""
    assert pick_device("cuda:0") == torch.device("cuda", torch.cuda.current_device())
    assert pick_device("cuda:1") == torch.device("cuda", torch.cuda.current_device())
    with pytest.raises(UserError):
        pick_device("cuda:2")
    assert torch.cuda.current_device() == 1


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_a_device_that_is_not_there_is_the_users_to_fix(no_accelerator, name):
    with pytest.raises(UserError, match=f"{name}.*use auto or cpu"):
        pick_device(name)


def test_a_gpu_number_that_is_too_high(two_gpus):
    with pytest.raises(UserError, match=r"cuda:2 .*has 2 CUDA.*cuda:0 to cuda:1"):
        pick_device("cuda:2")


@pytest.mark.parametrize(
    "name",
    ["tpu", "cuda:x", "cuda:-1", "", "meta", "xpu", "cuda:99999999999", "cuda:01", "cuda:256"],
)
def test_other_names_are_refused(name):
    """Of the last two, torch takes none with a leading 0, and 256 for 0."""
    with pytest.raises(UserError, match="is not auto, cpu"):
        pick_device(name)


@pytest.mark.parametrize(
    ("wish", "device", "has_bf16", "parameters", "expected", "reason"),
    [
        ("auto", CPU, True, 2_000_000, torch.bfloat16, "the CPU has it"),
        ("auto", CPU, True, 1_999_999, torch.float32, "pays on a CPU from 2M"),
        ("auto", CPU, False, 10**9, torch.float32, "neither AVX512-BF16 nor AMX"),
        ("auto", CUDA, True, 1, torch.bfloat16, "GPU has it"),
        ("auto", CUDA, False, 1, torch.float16, "GPU has no bf16"),
        ("auto", MPS, True, 10**9, torch.float32, "mps"),
        ("fp32", CPU, True, 10**9, torch.float32, "asked for"),
        ("bf16", CPU, True, 1, torch.bfloat16, "asked for"),
        ("bf16", CPU, False, 1, torch.bfloat16, "much slower than fp32"),
        ("fp16", CPU, False, 1, torch.float16, "slower than fp32"),
        ("bf16", CUDA, False, 1, torch.bfloat16, "emulates"),
        ("fp16", CUDA, True, 1, torch.float16, "asked for"),
    ],
)
def test_dtype(monkeypatch, wish, device, has_bf16, parameters, expected, reason):
    monkeypatch.setattr(module, "cpu_has_bf16", lambda: has_bf16)
    monkeypatch.setattr(module, "_cuda_has_bf16", lambda: has_bf16)
    dtype, why = pick_dtype(wish, device, parameters)
    assert dtype is expected
    assert reason in why
    assert why.startswith({v: k for k, v in module.DTYPES.items()}[expected])


def test_bf16_is_only_seen_where_the_cpu_says_so(monkeypatch):
    def probed(avx: bool, amx: bool) -> bool:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        return cpu_has_bf16.__wrapped__()

    assert not probed(False, False)
    assert probed(True, False)
    assert probed(False, True)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fma avx2 avx512f", False),
        ("flags : avx2 avx512_bf16", True),
        ("flags : amx_tile amx_bf16", True),
        ("Features : neon bf16", False),
    ],
)
def test_bf16_from_cpuinfo_where_torch_cannot_tell(monkeypatch, tmp_path, flags, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(flags)
    monkeypatch.setattr(torch, "cpu", types.SimpleNamespace())
    monkeypatch.setattr(module, "Path", lambda _: cpuinfo)
    assert cpu_has_bf16.__wrapped__() is expected
    cpuinfo.unlink()
    assert cpu_has_bf16.__wrapped__() is False


def test_the_cpus_answer_matches_what_the_system_says():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            flags = file.read().split()
    except OSError:
        pytest.skip("no /proc/cpuinfo here")
    assert cpu_has_bf16() == bool({"avx512_bf16", "amx_tile", "amx_bf16"} & set(flags))


@pytest.fixture
def compiler(monkeypatch):
    monkeypatch.setattr(module, "_compiler_missing", lambda device: "")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize(
    ("device", "flops", "expected"),
    [
        (CPU, 0.99 * 900 * 1e11, False),
        (CPU, 1.01 * 900 * 1e11, True),
        (CUDA, 0.99 * 120 * 5e13, False),
        (CUDA, 1.01 * 120 * 5e13, True),
        (MPS, 1e30, False),
    ],
)
def test_compile_auto_only_where_the_run_earns_it_back(compiler, device, flops, expected):
    chosen, reason = pick_compile("auto", device, flops)
    assert chosen is expected
    assert reason.startswith("on (auto" if expected else "off (auto")


def test_compile_reason_names_the_estimate(compiler):
    assert "about 10 min" in pick_compile("auto", CPU, 600 * 1e11)[1]


def test_compile_on_and_off_are_obeyed(compiler):
    assert pick_compile("on", CPU, 0) == (True, "on (asked for)")
    assert pick_compile("off", CUDA, 1e30) == (False, "off (asked for)")


def test_compile_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    chosen, reason = pick_compile("auto", CPU, 1e30)
    assert not chosen
    assert "no C++ compiler (no-such-compiler)" in reason
    with pytest.raises(UserError, match=r"compile: on asked for.*no-such-compiler.*use off"):
        pick_compile("on", CPU, 1e30)
    assert pick_compile("off", CPU, 1e30)[0] is False


def test_compile_without_pythons_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(module.shutil, "which", lambda _: "/usr/bin/g++")
    monkeypatch.setattr(module.sysconfig, "get_path", lambda _: str(tmp_path))
    assert "Python.h" in pick_compile("auto", CPU, 1e30)[1]


def test_compiled_code_is_kept_in_a_folder_of_ones_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(module._COMPILED_DIR, raising=False)
    keep_compiled()
    assert os.environ[module._COMPILED_DIR] == str(tmp_path / "cache" / "gpt-train" / "compiled")
    assert (tmp_path / "cache" / "gpt-train").stat().st_mode & 0o077 == 0
    monkeypatch.setenv(module._COMPILED_DIR, "elsewhere")
    keep_compiled()
    assert os.environ[module._COMPILED_DIR] == "elsewhere"


def test_where_others_can_write_no_compiled_code_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(module._COMPILED_DIR, raising=False)
    (tmp_path / "gpt-train").mkdir()
    (tmp_path / "gpt-train").chmod(0o777)
    keep_compiled()
    assert module._COMPILED_DIR not in os.environ
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled()
    assert module._COMPILED_DIR not in os.environ


def test_compile_is_off_on_windows(compiler, monkeypatch):
    monkeypatch.setattr(module.sys, "platform", "win32")
    assert pick_compile("auto", CPU, 1e30) == (False, "off (auto: not reliable on Windows)")


def test_autocast():
    a = torch.ones(4, 4)
    assert isinstance(autocast(CPU, torch.float32), nullcontext)
    for dtype in (torch.bfloat16, torch.float16):
        with autocast(CPU, dtype):
            assert (a @ a).dtype is dtype
    assert (a @ a).dtype is torch.float32


def test_the_scaler_works_for_fp16_only():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert grad_scaler(CPU, torch.float16).is_enabled()
        assert not grad_scaler(CPU, torch.bfloat16).is_enabled()
        assert not grad_scaler(CPU, torch.float32).is_enabled()


def test_seed_and_generator_state():
    seed_everything(5)
    first = torch.rand(3)
    state = rng_state()
    second = torch.rand(3)
    seed_everything(5)
    assert torch.equal(torch.rand(3), first)
    set_rng_state(state)
    assert torch.equal(torch.rand(3), second)
    seed_everything(2**63 - 1)
    assert all(isinstance(value, torch.Tensor) for value in state.values())


def test_states_of_absent_devices_are_left_out(no_accelerator):
    state = rng_state() | {"cuda": torch.zeros(16, dtype=torch.uint8)}
    set_rng_state(state)
    assert set(rng_state()) == {"cpu"}


def test_threads(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert set_threads() == physical_cores()
        assert set_threads(1) == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert set_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_hyper_threads_count_once_and_limits_count(monkeypatch):
    files = {"cpu.max": "max 100000", "thread_siblings_list": "0-1"}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(module, "_read", lambda path: files.get(path.name, ""))
    assert physical_cores() == 1
    files["thread_siblings_list"] = ""
    assert physical_cores() == 2
    files["cpu.max"] = "50000 100000"
    assert physical_cores() == 1


def test_busy_warning(monkeypatch):
    monkeypatch.setattr(module, "physical_cores", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.9, 0.0, 0.0), raising=False)
    assert busy_warning() is None
    monkeypatch.setattr(os, "getloadavg", lambda: (3.14, 0.0, 0.0))
    assert "3.1 on 4 core(s)" in (busy_warning() or "")
    monkeypatch.delattr(os, "getloadavg")
    assert busy_warning() is None


def test_peak_memory_is_in_bytes():
    block = torch.ones(50_000_000)  # 200 MB
    peak = peak_memory_bytes(CPU)
    assert peak > block.numel() * 4
    assert peak < 2**40
    synchronize(CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    device = pick_device("cuda")
    seed_everything(1)
    x = torch.rand(8, 8, device=device)
    state = rng_state()
    after = torch.rand(3, device=device)
    set_rng_state(state)
    assert torch.equal(torch.rand(3, device=device), after)
    with autocast(device, pick_dtype("auto", device, 1)[0]):
        assert (x @ x).dtype in (torch.bfloat16, torch.float16)
    synchronize(device)
    assert peak_memory_bytes(device) >= x.numel() * 4


@pytest.mark.skipif(sys.platform != "linux", reason="where a process begins with another's peak")
def test_peak_memory_is_the_process_own():
    """Its starter holds 1.2 GB: `ru_maxrss` of the started one would begin there."""
    code = (
        "import subprocess, sys\n"
        "held = bytearray(1_200_000_000)\n"
        "held[::4096] = b'1' * len(held[::4096])\n"
        "code = 'import torch; from gpt.device import peak_memory_bytes as p;'\n"
        "code += 'print(p(torch.device(chr(99) + chr(112) + chr(117))))'\n"
        "print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 700_000_000
