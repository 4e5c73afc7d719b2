"""Checks what needs a GPU: correctness, then compute-sanitizer on small shapes, then the timings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from lrcompress import _C

ROOT = Path(__file__).parents[1]
TESTS = ["-m", "pytest", "-m", "cuda", "tests/test_cuda.py"]
TOOLS = ("memcheck", "racecheck")
BENCHES = ("lowrank_cuda", "autocorrelation_cuda", "group_lasso_cuda")


def run(title: str, command: list[str], **environment: str) -> None:
    """Run one step; its failure is the end."""
    print(f"== {title}: {' '.join(command)}", flush=True)
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False)
    if result.returncode != 0:
        sys.exit(f"{title} failed with exit status {result.returncode}")


def main() -> None:
    """Say what is missing and stop, or run all steps."""
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here (torch.cuda.is_available() is False): nothing was checked")
    if not _C.build_info()["cuda"]:
        sys.exit(
            "lrcompress was built without CUDA: put nvcc on the PATH and build again; nothing was checked"
        )
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        sys.exit("there is no compute-sanitizer on the PATH; it comes with the CUDA toolkit")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    run("correctness", [sys.executable, *TESTS])
    for tool in TOOLS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, *TESTS, "-k", "small"]
        # torch's allocator hands out parts of large blocks, in which a write too far goes unnoticed.
        run(tool, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    for bench in BENCHES:
        run("timings", [sys.executable, f"bench/{bench}.py", "--json", f"bench/results/{bench}.json"])
    networks = ["--device", "cuda", "--json", "bench/results/lowrank_networks_cuda.json"]
    run("networks", [sys.executable, "bench/lowrank.py", *networks])


if __name__ == "__main__":
    main()
