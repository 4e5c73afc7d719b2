"""Compiles every CUDA kernel for every architecture and holds what it uses to a budget.

`--update` rewrites tools/cuda_budgets.json with what the compiler reports now.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUDGETS = ROOT / "tools" / "cuda_budgets.json"
ARCHS = ("80", "90")
# Per kernel; a spill is never in the budget.
LIMITS = ("registers", "stack", "shared")


def ptxas_report(nvcc: str, source: Path, arch: str) -> str:
    """Compile one file, warnings being errors, and return what ptxas says of each kernel."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-c", source, "-o", Path(folder) / "kernel.o", f"-I{ROOT / 'csrc'}"]
        command += ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xptxas=-v,-warn-spills"]
        command += ["-Werror=all-warnings"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"{source.name} does not compile for sm_{arch}:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def first_number(pattern: str, text: str) -> int:
    """The number a pattern captures, 0 where it does not occur."""
    match = re.search(pattern, text)
    return int(match.group(1)) if match else 0


def kernel_name(mangled: str) -> str:
    """The kernel's own name, and the mangled template arguments if any, so that instances differ.

    Itanium C++ ABI: `_Z` or `_ZN`, then names each after its length, read here in order from the start:
    the anonymous namespace carries a hash in which any later search may find a length by chance.
    """
    prefix = re.match(r"_ZN?", mangled)
    name, rest = "", mangled[prefix.end() :] if prefix else ""
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    arguments = re.match(r"I\w+?E(?=Ev)", rest)
    return name + (arguments[0] if arguments else "") or mangled


def parse(report: str) -> dict[str, dict[str, int]]:
    """What each kernel of a ptxas report uses."""
    usage = {}
    for part in report.split("Compiling entry function '")[1:]:
        usage[kernel_name(part.split("'")[0])] = {
            "registers": first_number(r"Used (\d+) registers", part),
            "stack": first_number(r"(\d+) bytes stack frame", part),
            "shared": first_number(r"(\d+) bytes smem", part),
            "spills": sum(first_number(rf"(\d+) bytes spill {kind}", part) for kind in ("stores", "loads")),
        }
    return usage


def complaints(name: str, used: dict[str, int], budget: dict[str, int] | None) -> list[str]:
    """How a kernel breaks its budget."""
    found = [f"{name}: spills {used['spills']} bytes"] if used["spills"] else []
    if budget is None:
        return [*found, f"{name}: not in {BUDGETS.name}"]
    return found + [
        f"{name}: {limit} {used[limit]} > {budget[limit]}" for limit in LIMITS if used[limit] > budget[limit]
    ]


def main() -> int:
    """Print the table; 1 if a kernel breaks its budget or a budget has no kernel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true")
    update = parser.parse_args().update
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("cuda-check skipped: there is no nvcc on the PATH")
        return 0
    measured = {}
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        for arch in ARCHS:
            for kernel, used in parse(ptxas_report(nvcc, source, arch)).items():
                measured[f"{kernel} sm_{arch}"] = used
    if update:
        budgets = {name: {limit: used[limit] for limit in LIMITS} for name, used in measured.items()}
        BUDGETS.write_text(json.dumps(budgets, indent=2) + "\n")
    budgets = json.loads(BUDGETS.read_text())
    width = max(len(name) for name in measured)
    print(f"{'kernel':{width}} {'registers':>15} {'stack':>10} {'shared':>10} {'spills':>7}")
    problems = [f"{name}: in {BUDGETS.name} but not compiled" for name in budgets.keys() - measured.keys()]
    for name, used in measured.items():
        budget = budgets.get(name)
        shown = [f"{used[limit]} / {budget[limit] if budget else '-'}" for limit in LIMITS]
        print(f"{name:{width}} {shown[0]:>15} {shown[1]:>10} {shown[2]:>10} {used['spills']:>7}")
        problems += complaints(name, used, budget)
    print("\n".join(problems) or "all within budget")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
