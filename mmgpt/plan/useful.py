"""Operations that a step's result needs: what model-FLOPs utilisation counts. Nothing recomputed, nothing masked.

Forward and twice that backward: of each product with a weight two operations for each of its numbers and token, of
attention two products over the pairs of a query and a key that it sees.
"""

from mmgpt.models.decoder import Decoder


def weights(model: Decoder.Config) -> int:
    """Numbers of the weights that every token is multiplied with: all but the embedding and the gains."""
    block = model.embed * model.head_dim * 2 * (model.heads + model.kv_heads) + 3 * model.embed * model.mlp
    return model.layers * block + model.embed * model.vocab


def of_weights(model: Decoder.Config, tokens: int) -> float:
    """Operations of a step's products with weights."""
    return 6.0 * weights(model) * tokens


def of_attention(model: Decoder.Config, pairs: int) -> float:
    """Operations of a step's attention over `pairs` of a query and a key that it sees, in all rows."""
    return 12.0 * model.layers * model.heads * model.head_dim * pairs
