"""Text and token ids: tokenizers, streaming, chat templates, tool calls, stop strings."""

from llada_jax.text.byte import ByteTokenizer
from llada_jax.text.chat import ChatTemplate
from llada_jax.text.hf import HFTokenizer
from llada_jax.text.load import load_tokenizer
from llada_jax.text.messages import ChatError, check_messages
from llada_jax.text.protocol import Tokenizer, TokenizerError
from llada_jax.text.special import SpecialNames
from llada_jax.text.spm import SentencePieceTokenizer
from llada_jax.text.stop import StopStringMatcher, find_stop
from llada_jax.text.stream import StreamDecoder
from llada_jax.text.tool_calls import ToolCall, parse_tool_calls

__all__ = [
    "ByteTokenizer",
    "ChatError",
    "ChatTemplate",
    "HFTokenizer",
    "SentencePieceTokenizer",
    "SpecialNames",
    "StopStringMatcher",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerError",
    "ToolCall",
    "check_messages",
    "find_stop",
    "load_tokenizer",
    "parse_tool_calls",
]
