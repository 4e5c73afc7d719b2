"""Samples from files: tensors, arrays and images become inputs; what cannot be read is named."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lrcompress import samples
from lrcompress.samples import Pictures
from lrcompress.types import CompressionError

RGB, GREY = Pictures(), Pictures((0.5,), (0.25,))


def read(path, most=None, pictures=RGB, dtype=torch.float32):
    return samples.read(path, most, pictures, dtype)


def normalised(pixels, pictures=RGB):  # [samples, channels, height, width], 0 to 255
    mean, std = (torch.tensor(part)[:, None, None] for part in (pictures.mean, pictures.std))
    return (torch.as_tensor(pixels).float() / 255 - mean) / std


def test_one_tensor_is_the_input_and_several_are_inputs_by_name(tmp_path):
    x, mask = torch.randn(250, 3), torch.arange(250)
    save_file({"x": x}, tmp_path / "one.safetensors")
    assert torch.equal(read(tmp_path / "one.safetensors"), x)
    save_file({"x": x, "mask": mask}, tmp_path / "two.safetensors")
    found = read(tmp_path / "two.safetensors")
    assert torch.equal(found["x"], x)
    assert found["mask"].dtype == torch.int64  # tokens and masks stay what they are
    batches = samples.in_batches(found)
    assert [len(batch["x"]) for batch in batches] == [100, 100, 50]
    assert torch.equal(torch.cat([batch["mask"] for batch in batches]), mask)
    assert [len(batch) for batch in samples.in_batches(x)] == [100, 100, 50]


def test_arrays_take_the_models_dtype_and_at_most_so_many_evenly_spaced(tmp_path):
    array = np.arange(40.0).reshape(10, 4)
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", x=array)
    for name in ("x.npy", "x.npz"):
        assert torch.equal(read(tmp_path / name), torch.tensor(array).float())
        assert read(tmp_path / name, dtype=torch.bfloat16).dtype == torch.bfloat16
        assert read(tmp_path / name, most=4)[:, 0].tolist() == [0.0, 8.0, 20.0, 28.0]
        assert len(read(tmp_path / name, most=11)) == 10


@pytest.mark.parametrize("layout", ["rows of channels", "channels first", "grey"])
def test_8_bit_arrays_are_images(tmp_path, layout):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 5, 7), dtype=np.uint8)
    pictures = GREY if layout == "grey" else RGB
    if layout == "grey":
        pixels = pixels[:, :1]
    stored = {
        "rows of channels": pixels.transpose(0, 2, 3, 1),
        "channels first": pixels,
        "grey": pixels[:, 0],
    }
    np.savez(tmp_path / "x.npz", images=stored[layout])
    assert torch.equal(read(tmp_path / "x.npz", pictures=pictures), normalised(pixels, pictures))


def test_a_folder_of_images_is_read_in_the_order_of_names(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="install pillow")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "sub").mkdir()
    for i, array in enumerate(pixels):
        image.fromarray(array).save(tmp_path / f"sub/{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    found = read(tmp_path)
    assert torch.equal(found, normalised(pixels.transpose(0, 3, 1, 2)))
    assert torch.equal(read(tmp_path, most=2), found[[0, 2]])
    assert read(tmp_path, pictures=GREY).shape == (4, 1, 8, 8)
    image.fromarray(pixels[0, :5]).save(tmp_path / "wide.png")
    with pytest.raises(CompressionError, match="--image-size"):
        read(tmp_path)
    assert read(tmp_path, pictures=Pictures(size=6)).shape == (5, 3, 6, 6)
    (tmp_path / "z.png").write_bytes(b"no image")
    with pytest.raises(CompressionError, match=r"z\.png"):
        read(tmp_path, pictures=Pictures(size=6))


def test_what_holds_no_samples_is_refused(tmp_path):
    with pytest.raises(CompressionError, match="holds no images"):
        read(tmp_path)
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(CompressionError, match="folder of images or one of"):
        read(tmp_path / "x.csv")
    save_file({"x": torch.ones(3), "y": torch.ones(4)}, tmp_path / "uneven.safetensors")
    with pytest.raises(CompressionError, match="equally many samples"):
        read(tmp_path / "uneven.safetensors")
    save_file({"x": torch.ones(())}, tmp_path / "scalar.safetensors")
    with pytest.raises(CompressionError, match="equally many samples"):
        read(tmp_path / "scalar.safetensors")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(CompressionError, match="cannot be read as arrays"):
        read(tmp_path / "objects.npy")
    np.save(tmp_path / "five.npy", np.zeros((2, 5, 4, 5), np.uint8))
    with pytest.raises(CompressionError, match="images of 3 channels"):
        read(tmp_path / "five.npy")


@pytest.mark.parametrize(("mean", "std"), [((1.0, 2.0), (1.0, 1.0)), ((0.0,), (0.0,)), ((0.0,), (1.0,) * 3)])
def test_mean_and_std_belong_together(mean, std):
    with pytest.raises(CompressionError, match="mean and std"):
        Pictures(mean, std)
