"""Documents: read, tokenised once, packed block-aligned, and served as resumable batches."""

from llada_jax.data.config import DataConfig, SourceSpec, Split
from llada_jax.data.errors import DataError, DataWarning
from llada_jax.data.pack import Batch, unpack
from llada_jax.data.pipeline import BatchIterator, make_batches, make_sources
from llada_jax.data.records import Conversation, RecordError, Text, as_record
from llada_jax.data.source import FileSource, GeneratedSource
from llada_jax.data.tokenize import Document, DocumentTokenizer

__all__ = [
    "Batch",
    "BatchIterator",
    "Conversation",
    "DataConfig",
    "DataError",
    "DataWarning",
    "Document",
    "DocumentTokenizer",
    "FileSource",
    "GeneratedSource",
    "RecordError",
    "SourceSpec",
    "Split",
    "Text",
    "as_record",
    "make_batches",
    "make_sources",
    "unpack",
]
