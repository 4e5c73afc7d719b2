"""The CUDA kernels, compiled by g++ and run on the CPU, a fiber a CUDA thread (tests/csrc/emulation)."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "csrc"
OPS = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
# The slowest mutants of all: `make test-slow` runs them.
SLOW = {"symmetric_eigenvalues"}
OBJECTS = ROOT / "build" / "csrc" / "ubsan"
# What makes threads wait: for each other, or for their copies to shared memory.
BARRIER = re.compile(r"__sync(?:threads|warp)\(\);|wait_for_copies<[^>]*>\(\);")
# Above the 32 rows of one warp, where most barriers begin to matter, and small enough to be quick.
MUTANT_SIDE = "64"

missing = [tool for tool in ("g++", "make") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)} on the PATH")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def sanitized_programs() -> Path:
    """Compile with the undefined-behaviour sanitizer and run everything in tests/csrc."""
    result = run("make", "-C", TESTS, "-j2", "ubsan")
    assert result.returncode == 0, result.stdout + result.stderr
    return OBJECTS


@pytest.mark.parametrize("op", OPS)
def test_programs_pass(sanitized_programs: Path, op: str) -> None:
    assert (sanitized_programs / f"test_{op}_emulated").exists()


@pytest.mark.parametrize(
    ("kernel", "message"),
    [("divergence", "a barrier that the others never reach"), ("overrun", "past the end of shared memory")],
)
def test_emulation_stops_broken_kernels(sanitized_programs: Path, kernel: str, message: str) -> None:
    result = run(sanitized_programs / "test_emulation", kernel)
    assert result.returncode == 1
    assert message in result.stderr


@pytest.mark.parametrize("op", [pytest.param(op, marks=pytest.mark.slow) if op in SLOW else op for op in OPS])
def test_every_barrier_of_the_kernel_is_needed(sanitized_programs: Path, tmp_path: Path, op: str) -> None:
    """Remove one barrier at a time: the emulated tests must fail."""
    source = (ROOT / "csrc" / "cuda" / f"{op}.cu").read_text()
    barriers = list(BARRIER.finditer(source))
    others = [path for path in (sanitized_programs / "cuda").glob("*.o") if path.stem != op]
    objects = [
        sanitized_programs / f"test_{op}_emulated.o",
        *(sanitized_programs / "cpu").glob("*.o"),
        *others,
    ]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{TESTS / 'emulation'}"]
    flags = ["-O1", "-std=c++20", "-w", "-fsanitize=undefined", *includes]

    def caught(number: int) -> bool:
        mutant = tmp_path / f"without_barrier_{number}.cu"
        mutant.write_text(source[: barriers[number].start()] + source[barriers[number].end() :])
        program = mutant.with_suffix("")
        built = run("g++", *flags, "-x", "c++", mutant, "-x", "none", *objects, "-o", program)
        assert built.returncode == 0, built.stderr
        return run(program, MUTANT_SIDE).returncode != 0

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(caught, range(len(barriers))))
    assert barriers
    survivors = [
        source[: barriers[i].start()].count("\n") + 1 for i, found in enumerate(outcomes) if not found
    ]
    assert not survivors, f"lines whose barrier nobody misses: {survivors}"
