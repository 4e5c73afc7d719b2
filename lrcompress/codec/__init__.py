"""Bytes on disk <-> artefact."""

from lrcompress.codec.artefact import Artefact, Stored, read_plan, reading, storable, write
from lrcompress.codec.states import State

__all__ = ["Artefact", "State", "Stored", "read_plan", "reading", "storable", "write"]
