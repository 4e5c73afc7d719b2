"""tools/cuda_check.py finds every kernel's name and holds it to its budget."""

import runpy
from pathlib import Path

import pytest

CHECK = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "cuda_check.py"))


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_Z8a_kernelPf", "a_kernel"),
        ("_ZN3lrc28symmetric_eigenvalues_kernelENS_4ArgsE", "symmetric_eigenvalues_kernel"),
        ("_ZN3lrc11some_kernelINS_4HalfEEEvPT_", "some_kernelINS_4HalfEE"),
        # 073a9d43 in the hash of the anonymous namespace is not a name of 73 characters.
        (
            "_ZN3lrc56_GLOBAL__N__073a9d43_18_autocorrelation_cu_c3e23594_117430autocorrelation_windows_kernelIfEE"
            "vNS_19AutocorrelationArgsIT_EENS_10PatchRoundE",
            "autocorrelation_windows_kernelIfE",
        ),
        ("plain_kernel", "plain_kernel"),
    ],
)
def test_name_of_a_kernel(mangled: str, name: str):
    assert CHECK["kernel_name"](mangled) == name


def test_spills_and_excess_are_complaints():
    used = {"registers": 41, "stack": 0, "shared": 0, "spills": 8}
    budget = {"registers": 40, "stack": 0, "shared": 0}
    assert CHECK["complaints"]("a_kernel", used, budget) == [
        "a_kernel: spills 8 bytes",
        "a_kernel: registers 41 > 40",
    ]
    assert not CHECK["complaints"]("a_kernel", {**budget, "spills": 0}, budget)
