"""The image encoder of SAM in the package `transformers`, with the weights of `shared.sam`."""

from __future__ import annotations

from torch import nn

__all__ = ["image_encoder"]

# our name -> theirs, first match wins inside a key
_NAMES = (
    ("neck.0.", "neck.conv1."),
    ("neck.1.", "neck.layer_norm1."),
    ("neck.2.", "neck.conv2."),
    ("neck.3.", "neck.layer_norm2."),
    ("patch_embed.proj.", "patch_embed.projection."),
    ("blocks.", "layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)


def image_encoder(encoder: nn.Module) -> nn.Module:
    """Their encoder of the same sizes and weights, with PyTorch's fused attention, in evaluation mode.

    Args:
        encoder: our ImageEncoderViT.
    """
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    first = encoder.blocks[0]
    config = SamVisionConfig(
        hidden_size=first.norm1.normalized_shape[0],
        num_hidden_layers=len(encoder.blocks),
        num_attention_heads=first.attn.num_heads,
        image_size=encoder.img_size,
        global_attn_indexes=[i for i, block in enumerate(encoder.blocks) if block.window_size == 0],
        attn_implementation="sdpa",
    )
    theirs = SamVisionEncoder(config)
    theirs.load_state_dict({_renamed(name): value for name, value in encoder.state_dict().items()})
    return theirs.eval()


def _renamed(name: str) -> str:
    for ours, theirs in _NAMES:
        name = name.replace(ours, theirs)
    return name
