"""Networks that take more than a line to make small, and the sizes of the others."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torchvision_operators
from torch import nn

REASON = 'pip install "lrcompress[zoo]" brings the networks'
WORDS = 60
WIDTHS = (8, 16, 24, 32)
ONCE = (1, 1, 1, 1)


def imported(library: str) -> Any:
    """Import a library of networks, or skip."""
    if importlib.util.find_spec("torchvision"):
        torchvision_operators.define()  # the others import it
    return pytest.importorskip(library, reason=REASON)


def hrnet(models: Any) -> nn.Module:
    sizes = copy.deepcopy(models.hrnet.cfg_cls["hrnet_w18_small"])
    for stage in (sizes[f"stage{i}"] for i in (1, 2, 3, 4)):
        stage |= {
            "num_channels": WIDTHS[: stage["num_branches"]],
            "num_blocks": ONCE[: stage["num_branches"]],
        }
    return models.hrnet.HighResolutionNetFeatures(sizes, feature_location="", out_indices=(1, 2, 3, 4))


def inception(models: Any) -> nn.Module:
    """The stem and a block of Inception v3, whose widths are fixed."""
    parts = models.inception
    stem, block = parts.BasicConv2d(3, 16, kernel_size=3, stride=2), parts.InceptionA(16, 8)
    return nn.Sequential(stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(232, 10))


def features(models: Any, **kept: str) -> tuple[nn.Module, list[int]]:
    """Return a backbone that gives the named blocks of a small network, and their widths."""
    whole = models.mobilenet_v3_small(weights=None, width_mult=0.25).features
    given = {int(block.removeprefix("block")): name for block, name in kept.items()}
    widths = [whole[i].out_channels for i in given]
    return models._utils.IntermediateLayerGetter(whole, {str(i): name for i, name in given.items()}), widths


def deeplab(models: Any) -> nn.Module:
    backbone, (width,) = features(models, block12="out")
    parts = models.segmentation.deeplabv3
    head = nn.Sequential(parts.ASPP(width, [2, 4, 6], 16), nn.Conv2d(16, 5, 1))
    return parts.DeepLabV3(backbone, head)


def fcn(models: Any) -> nn.Module:
    backbone, (width,) = features(models, block12="out")
    return models.segmentation.FCN(backbone, models.segmentation.fcn.FCNHead(width, 5))


def lraspp(models: Any) -> nn.Module:
    backbone, (low, high) = features(models, block3="low", block12="high")
    return models.segmentation.LRASPP(backbone, low, high, 5, inter_channels=16)


def pyramid(models: Any) -> nn.Module:
    """The backbone of torchvision's detectors."""
    blocks = {"3": "0", "8": "1", "12": "2"}
    whole = models.mobilenet_v3_small(weights=None, width_mult=0.25).features
    widths = [whole[int(i)].out_channels for i in blocks]
    return models.detection.backbone_utils.BackboneWithFPN(whole, blocks, widths, 16)


def vgg(models: Any) -> nn.Module:
    made = models.VGG(
        models.vgg.make_layers([8, "M", 16, "M", 24, 24, "M", 32, "M"], True), init_weights=False
    )
    made.avgpool = nn.AdaptiveAvgPool2d(2)
    made.classifier = nn.Sequential(nn.Linear(128, 48), nn.ReLU(), nn.Dropout(), nn.Linear(48, 10))
    return made


def detr() -> nn.Module:
    library = imported("transformers")
    backbone = library.ResNetConfig(
        embedding_size=8, hidden_sizes=WIDTHS, depths=ONCE, layer_type="basic", out_features=["stage4"]
    )
    sizes = {"d_model": 32, "num_queries": 10, "num_labels": 5, **HEADS, **both_sides(layers=1, ffn_dim=48)}
    config = library.DetrConfig(use_timm_backbone=False, backbone_config=backbone, **sizes)
    return library.DetrForObjectDetection(config)


def both_sides(**sizes: int) -> dict[str, int]:
    """Name the sizes of an encoder and of a decoder."""
    return {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()}


HEADS = both_sides(attention_heads=4)
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
WITHOUT_CACHE = {"use_cache": False}  # of keys and values: torch.export does not know what holds them
TEXT = {**ENCODER, **MARKS, "vocab_size": WORDS, "max_position_embeddings": 40}
GROUPED = {**TEXT, **WITHOUT_CACHE, "num_key_value_heads": 2}
TWO_SIDED = {
    **MARKS, **HEADS, **WITHOUT_CACHE, **both_sides(layers=2, ffn_dim=48),
    "d_model": 32, "vocab_size": WORDS, "decoder_start_token_id": 1,
}  # fmt: skip
PATCHES = {**ENCODER, "image_size": 32, "patch_size": 8}
FEW_BLOCKS = {"channels": WIDTHS, "layers": ONCE}
SMALL_VIT = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}
