"""Regular files, files that appear whole, and safetensors, all read as if an enemy had written them.

``files.tensors`` is imported by name: it needs torch, which the command line's help should not wait for.
"""

from lrcompress.files.regular import FLAGS, opened, text_of
from lrcompress.files.whole import Draft, abandoned, draft, flushed, locked

__all__ = ["FLAGS", "Draft", "abandoned", "draft", "flushed", "locked", "opened", "text_of"]
