"""Our reader and writer of safetensors: the library's bytes, memory of their own, and hostile headers."""

import io
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lrcompress as lrc
from lrcompress import files
from lrcompress.files import tensors as ours

DTYPES = list(ours._NAMES)


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randint(-3, 4, shape).abs().to(torch.float32).to(dtype)


def some_tensors() -> dict[str, Tensor]:
    found = {f"{i}.{dtype}": random(dtype, 3, 5) for i, dtype in enumerate(DTYPES)}
    found |= {
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "expanded": torch.ones(1, 3).expand(4, 3),
        "part": torch.arange(9.0)[2:5],
        'ümlaut " \\ ': torch.ones(2),
        "large": torch.rand(3, 1 << 18),
    }
    return found


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with files.opened(path) as file:
        described = ours.described(file)
        values, _ = described.values()
    return values, described.metadata


def test_files_are_those_of_the_library_to_the_byte():
    found = some_tensors()
    plain = {name: tensor.contiguous() for name, tensor in found.items()}
    for metadata in ({"format": "pt"}, {"format": "ümlaut"}):
        file = io.BytesIO()
        ours.write(file, found, metadata)
        assert file.getvalue() == safetensors.torch.save(plain, metadata)


def test_files_of_the_library_are_read(tmp_path):
    plain = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    safetensors.torch.save_file(plain, tmp_path / "file")
    values, metadata = read(tmp_path / "file")
    assert metadata == {}
    assert values.keys() == plain.keys()
    for name, tensor in plain.items():
        assert (values[name].dtype, values[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes(ours._bytes_of(values[name])) == bytes(ours._bytes_of(tensor)), name


def test_bits_that_say_conjugated_or_negated_are_made_true(tmp_path):
    z = torch.randn(4, dtype=torch.complex64)
    with (tmp_path / "file").open("wb") as file:
        ours.write(file, {"conj": z.conj(), "neg": z.conj().imag, "plain": z}, {})
    values, _ = read(tmp_path / "file")
    assert torch.equal(values["conj"], z.conj().resolve_conj())
    assert torch.equal(values["neg"], -z.imag)


class Wrapper(Tensor):
    """A tensor whose values are elsewhere, as those of torchao and DTensor are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(value):
            return value.inner if isinstance(value, cls) else value

        result = func(*map(plain, args), **(kwargs or {}))
        return cls(result) if isinstance(result, Tensor) else result

    def __deepcopy__(self, memo):
        return self


KINDS = ("complex128", "float4", "sparse", "compressed", "quantised", "subclass", "meta")


def unstorable() -> dict[str, Tensor]:
    return {
        "complex128": torch.zeros(2, dtype=torch.complex128),
        "float4": torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "sparse": torch.eye(3).to_sparse(),
        "compressed": torch.eye(3).to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "subclass": Wrapper(torch.ones(3)),
        "meta": torch.empty(3, device="meta"),
    }


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*quanti")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("artefact", [False, True], ids=["new folder", "over an artefact"])
def test_what_cannot_be_stored_is_refused_by_name_before_anything_is_written(tmp_path, kind, artefact):
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    small, plan = lrc.compress(model, lrc.Budget(params=0.9))
    if artefact:
        lrc.save(small, plan, tmp_path / "out")
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    small[0].register_buffer("odd", unstorable()[kind])
    with pytest.raises(lrc.WeightError, match=r"tensor '0\.odd' cannot be saved"):
        lrc.save(small, plan, tmp_path / "out")
    if artefact:
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    else:
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"], ids=ascii)
def test_a_name_that_cannot_be_stored_is_refused(tmp_path, name):
    small, plan = lrc.compress(nn.Sequential(nn.Linear(8, 8)).eval(), lrc.Budget(params=0.9))
    small.register_buffer(name, torch.ones(2))
    with pytest.raises(lrc.WeightError, match="cannot hold its name"):
        lrc.save(small, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_share_memory_but_not_their_bits_are_two(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    small, plan = lrc.compress(model, lrc.Budget(params=0.9))
    z = torch.randn(4, dtype=torch.complex64)
    for net in (model, small):
        net.register_buffer("plain", z)
        net.register_buffer("conjugated", z.conj())
    lrc.save(small, plan, tmp_path)
    assert torch.equal(lrc.load(tmp_path, model).conjugated, z.conj().resolve_conj())


# ---- memory ----

LOAD = """
import re, sys, torch
from pathlib import Path
from torch import nn
import lrcompress as lrc
with torch.device("meta"):
    net = nn.Sequential(nn.Linear(64, 4096), *[nn.Linear(4096, 4096, bias=False) for _ in range(2)]).eval()
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
lrc.load(sys.argv[1], net[:1])
before = peak()
lrc.load(sys.argv[2], net)
print(peak() - before)
"""


def test_loading_holds_the_file_once(tmp_path):
    net = nn.Sequential(nn.Linear(64, 4096), *[nn.Linear(4096, 4096, bias=False) for _ in range(2)]).eval()
    for name, model in (("small", net[:1]), ("large", net)):
        plan = lrc.plan(net[:1], lrc.Budget(params=0.9), lrc.svd())
        lrc.save(lrc.apply(model, plan), plan, tmp_path / name)
    size = sum(path.stat().st_size for path in (tmp_path / "large").iterdir())
    folders = [str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run([sys.executable, "-c", LOAD, *folders], capture_output=True, text=True, check=True)
    assert 0.9 * size < 1024 * int(done.stdout) < 1.2 * size


def test_a_loaded_model_does_not_change_with_its_files(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    small, plan = lrc.compress(model, lrc.Budget(params=0.9))
    lrc.save(small, plan, tmp_path)
    loaded = lrc.load(tmp_path, model)
    (path,) = tmp_path.glob("model-*")
    path.write_bytes(bytes(path.stat().st_size))
    path.write_bytes(b"")
    assert torch.equal(loaded[0].U, small[0].U)


def test_tensors_are_aligned_as_torch_s_own(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        ours.write(file, some_tensors(), {})
    values, _ = read(tmp_path / "file")
    assert {value.data_ptr() % torch.empty(64).element_size() for value in values.values()} == {0}
    assert len({value.untyped_storage().data_ptr() for value in values.values() if value.numel()}) == sum(
        value.numel() > 0 for value in values.values()
    )


# ---- hostile headers ----


def test_a_file_of_holes_is_compared_with_the_model_before_it_is_read(tmp_path):
    """A terabyte of zeros takes no room on the disk."""
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    small, plan = lrc.compress(model, lrc.Budget(params=0.9))
    lrc.save(small, plan, tmp_path)
    (path,) = tmp_path.glob("model-*")
    shapes = {name: list(tensor.shape) for name, tensor in small.state_dict().items()}
    entries, end = {}, 0
    for name, shape in (shapes | {"0.U": [2**38]}).items():
        begin, end = end, end + 4 * math.prod(shape)
        entries[name] = entry(shape=shape, offsets=(begin, end))
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + end)
    with pytest.raises(lrc.FormatError, match=r"tensor '0.U' must be"):
        lrc.load(tmp_path, model)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(lrc.FormatError) as error:
        read(tmp_path / "file")
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    "entries",
    [
        [],
        {"a": []},
        {"a": {"dtype": "F32"}},
        {"a": entry("F31")},
        {"a": entry(["F32"])},
        {"a": entry(shape=(-2,))},
        {"a": entry(shape=(2.0,))},
        {"a": entry(shape=(True, 2))},
        {"a": entry(shape=(2**62, 4, 0), offsets=(0, 0))},
        {"a": entry(shape=(0, 2**62, 4), offsets=(0, 0))},
        {"a": entry(shape=(0, 2**63), offsets=(0, 0))},
        {"a": entry(shape=(10**30, 0), offsets=(0, 0))},
        {"a": entry(shape=(1,) * 65, offsets=(0, 4))},
        {"a": entry(shape=(2**40,), offsets=(0, 2**42))},
        {"a": entry(offsets=(0, 4))},
        {"a": entry(offsets=(4, 12))},
        {"a": entry(offsets=(8, 0))},
        {"a": entry(offsets=(-8, 0))},
        {"a": entry(offsets=(0, 8, 8))},
        {"a": entry(), "b": entry()},
        {"a": entry(), "b": entry(offsets=(4, 12))},
        {"__metadata__": 3, "a": entry()},
        {"__metadata__": {"format": 3}, "a": entry()},
        {"a": entry() | {"more": 1}},
        "[" * 900 + "]" * 900,
        '{"a": 1, "a": 1}',
        '{"a": NaN}',
        "x" * 5000,
    ],
    ids=lambda entries: ascii(entries)[:50],
)
def test_a_hostile_header_is_refused(tmp_path, entries):
    header = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    refused(tmp_path, struct.pack("<Q", len(header)) + header + bytes(8))


def test_a_header_s_length_is_bounded_by_the_file(tmp_path):
    for length in (9, 2**31, 2**64 - 1):
        refused(tmp_path, struct.pack("<Q", length) + b"{}")
    for content in (b"", b"\0" * 7, b"\0" * 8):
        refused(tmp_path, content)


def test_random_bytes_are_refused(tmp_path):
    generator = np.random.default_rng(0)
    for length in range(200):
        refused(tmp_path, struct.pack("<Q", length % 40) + generator.bytes(length))
