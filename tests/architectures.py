"""Small configurations of the families that people have, with random weights and inputs for each.

Depths and widths are such that a network takes seconds; what it is made of is that of the real one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from small_networks import (
    ENCODER,
    FEW_BLOCKS,
    GROUPED,
    MARKS,
    ONCE,
    PATCHES,
    SMALL_VIT,
    TEXT,
    TWO_SIDED,
    WIDTHS,
    WITHOUT_CACHE,
    WORDS,
    deeplab,
    detr,
    fcn,
    hrnet,
    imported,
    inception,
    lraspp,
    pyramid,
    vgg,
)
from torch import Tensor, nn

import lrcompress as lrc

SAMPLES = 8  # in a batch


@dataclass(frozen=True)
class Architecture:
    """A network, and what it is run on."""

    library: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]  # of so many samples

    def __str__(self) -> str:
        return f"{self.library}, {self.name}"

    def built(self) -> nn.Module:
        """Return the network in evaluation mode, the same each time, as if it had been trained a little."""
        torch.manual_seed(0)
        model = self.make().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
            elif parameter.ndim == 1 and parameter.abs().max() < 1e-3:
                nn.init.uniform_(parameter, 0.5, 1.5)  # a branch that is switched off until it is trained
        lrc.reestimate_batchnorm(model, [self.inputs(SAMPLES)])
        return model


def images(side: int, name: str | None = None) -> Callable[[int], Any]:
    """Return images, by keyword where the argument has a name."""

    def make(samples: int) -> Any:
        x = torch.randn(samples, 3, side, side)
        return x if name is None else {name: x}

    return make


def tokens(samples: int) -> dict[str, Tensor]:
    """Return what a tokenizer gives of texts of two lengths."""
    ids, mask = torch.randint(3, WORDS, (samples, 12)), torch.ones(samples, 12, dtype=torch.int64)
    ids[::2, 8:], mask[::2, 8:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def two_texts(samples: int) -> dict[str, Tensor]:
    return {**tokens(samples), "decoder_input_ids": torch.randint(3, WORDS, (samples, 7))}


def by_timm(name: str, side: int = 64, **kwargs: Any) -> Architecture:
    """A network by its name, with other widths and depths."""

    def make() -> nn.Module:
        return imported("timm").create_model(name, num_classes=10, **kwargs)

    return Architecture("timm", name, make, images(side))


def of_timm(name: str, make: Callable[[Any], nn.Module], side: int = 64) -> Architecture:
    """A network made of the classes of ``timm.models``, where names have no arguments for its sizes."""
    return Architecture("timm", name, lambda: make(imported("timm").models), images(side))


def of_torchvision(name: str, make: Callable[[Any], nn.Module], side: int = 64) -> Architecture:
    """A network made of ``torchvision.models``."""
    return Architecture("torchvision", name, lambda: make(imported("torchvision").models), images(side))


def of_transformers(name: str, inputs: Callable[[int], Any], /, **config: Any) -> Architecture:
    """A network of transformers with the sizes of its configuration."""

    def make() -> nn.Module:
        library = imported("transformers")
        kind = getattr(library, name)
        return kind(kind.config_class(**config))

    return Architecture("transformers", name, make, inputs)


def spectrograms(samples: int) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(samples, 16, 48),
        "decoder_input_ids": torch.randint(3, WORDS, (samples, 7)),
    }


def sounds(samples: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(samples, 800)}


def captioned(samples: int) -> dict[str, Tensor]:
    return {**tokens(samples), "pixel_values": torch.randn(samples, 3, 32, 32)}


def ids_alone(samples: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(samples)["input_ids"]}


CONVOLUTIONAL = [
    by_timm("resnet18", **FEW_BLOCKS),
    by_timm("resnext50_32x4d", **FEW_BLOCKS, cardinality=4, base_width=32),
    by_timm("seresnet50", **FEW_BLOCKS),
    by_timm("mobilenetv2_035"),
    by_timm("mobilenetv3_small_050"),
    by_timm("mobilenetv4_conv_small_035"),
    of_timm(
        "efficientnet_b0, narrow",
        lambda models: models.efficientnet._gen_efficientnet("efficientnet_b0", 0.25, 0.25, num_classes=10),
    ),
    of_timm(
        "tf_efficientnet_b0, narrow",
        lambda models: models.efficientnet._gen_efficientnet(
            "tf_efficientnet_b0", 0.25, 0.25, pad_type="same", num_classes=10
        ),
    ),
    of_timm(
        "efficientnet_lite0, narrow",
        lambda models: models.efficientnet._gen_efficientnet_lite(
            "efficientnet_lite0", 0.25, 0.25, num_classes=10
        ),
    ),
    by_timm("convnext_tiny", depths=ONCE, dims=WIDTHS),
    of_timm(
        "regnety, narrow",
        lambda models: models.regnet.RegNet(
            models.regnet.RegNetCfg(depth=6, w0=16, wa=16.0, wm=2.0, group_size=8, se_ratio=0.25),
            num_classes=10,
        ),
    ),
    of_timm(
        "ghostnet, three stages",
        lambda models: models.ghostnet.GhostNet(
            [[[3, 16, 16, 0, 1]], [[3, 48, 24, 0, 2]], [[5, 72, 40, 0.25, 2]]], num_classes=10
        ),
    ),
    of_timm("hrnet_w18_small, narrow", hrnet),
    by_timm("test_byobnet"),
    by_timm("test_nfnet"),
    of_torchvision("densenet", lambda models: models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=10)),
    of_torchvision("vgg, batch norm", vgg),
    of_torchvision("inception_v3, a block", inception),
    of_torchvision("shufflenet_v2_x0_5", lambda models: models.shufflenet_v2_x0_5(num_classes=10)),
    of_torchvision("squeezenet1_1", lambda models: models.squeezenet1_1(num_classes=10)),
    of_torchvision("mnasnet, narrow", lambda models: models.MNASNet(0.35, num_classes=10)),
    of_torchvision("deeplabv3", deeplab),
    of_torchvision("fcn", fcn),
    of_torchvision("lraspp", lraspp),
    of_torchvision("detector's pyramid", pyramid),
]

ATTENDING = [
    by_timm("vit_tiny_patch16_224", **SMALL_VIT),
    by_timm("deit_tiny_distilled_patch16_224", **SMALL_VIT),
    by_timm("beit_base_patch16_224", **SMALL_VIT),
    by_timm(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=4,
        embed_dim=16,
        depths=(1, 2, 1, 1),
        num_heads=(2, 2, 2, 2),
    ),
    of_timm(
        "mlp_mixer",
        lambda models: models.mlp_mixer.MlpMixer(
            img_size=64, patch_size=16, embed_dim=32, num_blocks=2, num_classes=10
        ),
    ),
    by_timm("test_maxvit", img_size=64),
    by_timm("test_coatnet", img_size=64),
    by_timm("edgenext_xx_small", dims=WIDTHS, depths=(1, 1, 2, 1)),
    by_timm("test_mambaout"),
    of_torchvision(
        "vision transformer", lambda models: models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10), 32
    ),
    of_transformers("ViTForImageClassification", images(32, "pixel_values"), **PATCHES),
    of_transformers("Dinov2Model", images(32, "pixel_values"), **PATCHES),
    of_transformers(
        "SegformerForSemanticSegmentation",
        images(64, "pixel_values"),
        depths=ONCE,
        hidden_sizes=WIDTHS,
        num_attention_heads=(1, 2, 2, 4),
        decoder_hidden_size=24,
        num_labels=5,
    ),
    Architecture("transformers", "DetrForObjectDetection", detr, images(64, "pixel_values")),
    of_transformers("CLIPModel", captioned, text_config=TEXT, vision_config=PATCHES, projection_dim=24),
]

SEQUENCES = [
    of_transformers("BertForSequenceClassification", tokens, **TEXT),
    of_transformers("RobertaModel", tokens, **TEXT),
    of_transformers(
        "DistilBertForMaskedLM",
        tokens,
        vocab_size=WORDS,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=40,
    ),
    of_transformers("AlbertModel", tokens, **TEXT, embedding_size=16),
    of_transformers("ElectraForPreTraining", tokens, **TEXT, embedding_size=16),
    of_transformers(
        "DebertaV2Model",
        tokens,
        **TEXT,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=-1,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
    ),
    of_transformers("MPNetModel", tokens, **TEXT),
    of_transformers(
        "GPT2LMHeadModel",
        tokens,
        **MARKS,
        **WITHOUT_CACHE,
        vocab_size=WORDS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=40,
    ),
    of_transformers("LlamaForCausalLM", tokens, **GROUPED),
    of_transformers("MistralForCausalLM", tokens, **GROUPED),
    of_transformers("Qwen2ForCausalLM", tokens, **GROUPED),
    of_transformers("GemmaForCausalLM", tokens, **GROUPED, head_dim=8),
    of_transformers("Phi3ForCausalLM", tokens, **GROUPED),
    of_transformers("MixtralForCausalLM", tokens, **GROUPED, num_local_experts=4),
    of_transformers(
        "MambaForCausalLM",
        ids_alone,
        **MARKS,
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        **WITHOUT_CACHE,
    ),
    of_transformers(
        "T5ForConditionalGeneration",
        two_texts,
        **WITHOUT_CACHE,
        vocab_size=WORDS,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
    ),
    of_transformers("BartModel", two_texts, **TWO_SIDED, max_position_embeddings=40),
    of_transformers(
        "WhisperModel",
        spectrograms,
        **TWO_SIDED,
        num_mel_bins=16,
        max_source_positions=24,
        max_target_positions=40,
    ),
    of_transformers(
        "Wav2Vec2ForCTC",
        sounds,
        **ENCODER,
        vocab_size=WORDS,
        conv_dim=(16, 16, 16),
        conv_kernel=(10, 3, 3),
        conv_stride=(5, 2, 2),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    ),
]

ARCHITECTURES = [*CONVOLUTIONAL, *ATTENDING, *SEQUENCES]

# What `make test` runs: sums, concatenations, groups, channels that come last, several branches, attention.
QUICK = (
    "resnet18",
    "resnext50_32x4d",
    "densenet",
    "vgg, batch norm",
    "convnext_tiny",
    "test_byobnet",
    "mlp_mixer",
    "vit_tiny_patch16_224",
)

# What cannot be served: a network, a property of `sweep.PROPERTIES`, and the pattern of the error.
REFUSED = {
    ("Phi3ForCausalLM", "lnr"): "the least possible is",  # its wide layers give two halves, and three heads
    ("MixtralForCausalLM", "lnr"): "the least possible is",  # its heads share keys, its experts are no layers
    ("MambaForCausalLM", "lnr"): "the least possible is",  # its state space mixes all channels
}
