"""The Segment Anything Model, our own modules with the official state-dict names."""

from .grid_decoder import DecodedGrid, GridDecoder, ImageBases
from .image_encoder import ImageEncoderViT
from .mask_decoder import DecodedTokens, MaskDecoder
from .prompt_decoder import PromptDecoder
from .prompt_encoder import PromptEncoder
from .sam import Sam
from .transformer import TwoWayTransformer

__all__ = [
    "DecodedGrid",
    "DecodedTokens",
    "GridDecoder",
    "ImageBases",
    "ImageEncoderViT",
    "MaskDecoder",
    "PromptDecoder",
    "PromptEncoder",
    "Sam",
    "TwoWayTransformer",
]
