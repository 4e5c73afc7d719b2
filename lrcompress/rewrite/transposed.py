"""Linear layers that hold their weight transposed, as `Conv1D` of Hugging Face's transformers does."""

from __future__ import annotations

from collections import Counter

from torch import nn

from lrcompress.rewrite.copying import copied


def with_linears(model: nn.Module) -> nn.Module:
    """Return a model in which nn.Linear stands for every Conv1D: y = x W + b, W [in, out], of transformers.

    The type is known by its name and shapes, so that transformers need not be installed. Everything else is
    shared with ``model``, which is untouched, and returned itself when it holds no such layer. Layers with
    tied weights, hooks or a forward of their own stay as they are.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    found = {
        name: _linear(module)
        for name, module in model.named_modules()
        if _is_transposed(module) and all(owners[id(p)] == 1 for p in module.parameters())
    }
    if not found:
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copied(model, shared, found)


def _is_transposed(module: nn.Module) -> bool:
    if type(module).__name__ != "Conv1D":
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return (
        type(weight) is type(bias) is nn.Parameter
        and weight.ndim == 2
        and bias.shape == weight.shape[1:] == (getattr(module, "nf", None),)
        and not any((*hooks, module._backward_pre_hooks))
        and "forward" not in vars(module)
    )


def _linear(module: nn.Module) -> nn.Linear:
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    inputs, outputs = weight.shape
    made = nn.Linear(inputs, outputs, device="meta", dtype=weight.dtype)
    made.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)
    made.register_parameter("bias", bias)
    return made.train(module.training)
