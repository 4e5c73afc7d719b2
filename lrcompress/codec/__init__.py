"""Bytes on disk <-> artefact."""

from lrcompress.codec.artefact import Artefact, read, read_plan, storable, write

__all__ = ["Artefact", "read", "read_plan", "storable", "write"]
