"""What malloc keeps and what it gives back: seen from outside, in processes of their own."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="options of glibc's malloc")

BUILDS = """
import os, sys
from pathlib import Path
from gpt.configfile import load_config
import gpt.data
from gpt.data import open_data

gpt.data.MUCH_BYTES = 0
os.cpu_count = lambda: 2  # each thread holds some text

def peak_mib():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024

print(peak_mib())
for folder in sys.argv[1:]:
    data = [("data.source", folder), ("data.dir", folder + "-shards")]
    config = load_config(Path("configs/quickstart.yaml"), [*data, ("tokenizer.kind", "bytes")])
    open_data(config, progress=False)
    print(peak_mib())
"""

LEAVES = """
from gpt.malloc import freed_memory_given_back, keep_freed_memory

def left_mib(count):
    "What stays with the process of so many blocks of 1 MiB, written and freed."
    blocks = [b"." * 2**20 for _ in range(count)]
    del blocks
    with open("/proc/self/status") as status:
        return int(status.read().partition("VmRSS:")[2].split()[0]) // 1024

at_first = left_mib(0)
with freed_memory_given_back():
    print(left_mib(64) - at_first)
    keep_freed_memory()  # as when a text becomes shards in a thread
print(left_mib(64) - at_first)
with freed_memory_given_back():
    pass
print(left_mib(128) - at_first)
keep_freed_memory(False)
print(left_mib(256) - at_first)
"""


def numbers_of(code: str, *arguments: object) -> list[int]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return [int(line) for line in done.stdout.split()]


def test_six_times_the_text_takes_no_more_memory(tmp_path: Path) -> None:
    rng = random.Random(3)
    words = " ".join(f"{rng.getrandbits(rng.randint(1, 60)):x}" for _ in range(1_000_000))
    for folder, files in (("small", 1), ("large", 6)):
        (tmp_path / folder).mkdir()
        for number in range(files):
            text = words[1000 * number :].replace(" 1", "\n1")
            (tmp_path / folder / f"{number}.txt").write_text(text, encoding="utf-8")
    before, small, large = numbers_of(BUILDS, tmp_path / "small", tmp_path / "large")
    assert large < small + 12
    assert large < before + 46  # 50 to 60 where malloc is left alone


def test_memory_is_kept_where_someone_asked_for_it() -> None:
    given_back, kept, kept_later, no_longer = numbers_of(LEAVES)
    assert given_back < 8
    assert 56 < kept < 72
    assert 120 < kept_later < 136
    assert no_longer < 136
