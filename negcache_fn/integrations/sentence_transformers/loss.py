"""The cache as a loss of sentence-transformers: `MultipleNegativesRankingLoss`, and the negatives of a cache."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import cos_sim, dot_score  # pyright: ignore[reportUnknownVariableType] - numpy's
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from negcache_fn._cache.state import init_cache
from negcache_fn._checks import check_choice, check_size
from negcache_fn._encoders.chunked import chunked
from negcache_fn._options import StepOptions
from negcache_fn._ranks.group import SHARD_MULTIPLE
from negcache_fn._step import check_options, step_
from negcache_fn.distributed import local_capacity
from negcache_fn.integrations.sentence_transformers.matryoshka import Truncated, dimensions, is_decorated, normalized
from negcache_fn.integrations.sentence_transformers.texts import Rows, Texts, content_ids
from negcache_fn.integrations.sentence_transformers.wrapping import unwrapped
from negcache_fn.nn import Cache, Scale

__all__ = ["NegativeCacheLoss", "all_ranks"]

_DOCUMENT_IDS = ("tokens", "labels")


class NegativeCacheLoss(nn.Module):
    """Cross entropy of each anchor's positive against the batch and a cache of earlier documents.

    In place of `MultipleNegativesRankingLoss(model)`, whose arguments it takes: `NegativeCacheLoss(model)`. The first
    column is the anchor, the second its positive, further ones are hard negatives; documents of all columns but the
    first enter the cache. With an empty cache the loss is that of `MultipleNegativesRankingLoss`.

    The cache is not in the trainer's checkpoints: `NegativeCacheCallback` keeps it beside them. It belongs to the
    model: with another one, as `model_init` makes for each trial, the loss begins anew.

    Args:
        model: whose columns of documents are tokenised alike.
        cache_size: slots; with `gather_across_devices` of all ranks together (rounded up to a multiple of 1024 for
            each), else of each.
        scale: of the similarities, 1 / temperature.
        similarity_fct: `cos_sim` or `dot_score` of `sentence_transformers.util`.
        gather_across_devices: whether the ranks share batches, draws and one cache, which is spread over them. Else
            each has its own.
        learnable_scale: whether the scale is trained; its gradient is averaged over the ranks.
        mini_batch_size: texts that are embedded at a time, with activations computed again in the backward pass; None:
            all at once.
        max_length: tokens that a slot of the cache has room for; the model's `max_seq_length` by default.
        document_ids: "tokens": equal texts are one document. "labels": the label column has the ids, an integer for
            each positive, or [B, n] for all n documents of each row.
        embedding_dtype: of the cached embeddings.
        seed: of the draws.
        options: of `negcache_fn.step`, except for `in_batch`, `reduction` and `placement`, which the loss decides.

    Raises:
        ValueError, TypeError: an argument that does not fit, named.

    Reference: Lindgren et al., NeurIPS 2021.
    """

    # Read by MatryoshkaLoss: it then leaves `model.forward` alone, as drawn documents differ between its dimensions,
    # and says what to do by decorating `calculate_loss`.
    uses_gradient_cache = True

    def __init__(
        self,
        model: SentenceTransformer,
        cache_size: int = 16384,
        scale: float = 20.0,
        similarity_fct: Callable[..., Tensor] = cos_sim,
        gather_across_devices: bool = False,
        *,
        learnable_scale: bool = False,
        mini_batch_size: int | None = None,
        max_length: int | None = None,
        document_ids: str = "tokens",
        embedding_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        options: StepOptions = StepOptions(),
    ) -> None:
        super().__init__()
        check_options(options)
        if options.decided_by_adapters != StepOptions().decided_by_adapters:
            raise ValueError(
                f"options is {options!r}; expected in_batch, reduction and placement as they are by default, as the "
                f"loss decides them"
            )
        if similarity_fct not in (cos_sim, dot_score):
            raise ValueError(f"similarity_fct is {similarity_fct!r}; expected cos_sim or dot_score")
        check_choice("document_ids", document_ids, _DOCUMENT_IDS)
        check_size("cache_size", cache_size)
        for name, size in (("mini_batch_size", mini_batch_size), ("max_length", max_length)):
            if size is not None:
                check_size(name, size)
        self.model: nn.Module = model  # the trainer replaces it by what wraps it
        self.scaling: Scale = Scale(scale, learnable=learnable_scale)
        self.cache_size = cache_size
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self.mini_batch_size = mini_batch_size
        self.document_ids = document_ids
        self.embedding_dtype = embedding_dtype
        self.seed = seed
        self.options = options
        self.metrics: dict[str, Tensor] = {}  # of the last forward pass, see `negcache_fn.step`
        self._width = _width(model, max_length)
        self._padding = _padding(model)
        self._cache: Cache | None = None
        self._documents: Texts | None = None
        self._made_by = (model,)  # a tuple: not a child

    @property
    def state(self) -> TensorDictBase | None:
        """The cache, or this rank's part; None before the first batch, which tells what features a document has."""
        return None if self._cache is None else self._cache.state

    @state.setter
    def state(self, state: TensorDictBase) -> None:
        self._cache = Cache(state)
        self._made_by = (unwrapped(self.model),)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks over which the cache is spread."""
        return all_ranks() if self.gather_across_devices else None

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss, []. Where gradients are off, nothing is written."""
        self._forget_other_models()
        anchors, *columns = sentence_features
        if not columns:
            raise ValueError("sentence_features has 1 column; expected at least 2, an anchor and its positive")
        texts = self._texts_of(anchors)
        queries = self._embed(texts, texts.rows([anchors]))
        if self._documents is None:
            self._documents = self._texts_of(columns[0], self._width)
        documents = self._documents.rows(columns)
        if self._cache is None:
            self._cache = Cache(self._empty_cache(queries, documents))
        return self._step(queries, documents, self._ids(documents, labels, len(columns)))

    def calculate_loss(self) -> Tensor:
        """Where MatryoshkaLoss puts its dimensions."""
        raise NotImplementedError("calculate_loss is not called; expected a call of the loss itself")

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {
            "scale": float(torch.as_tensor(self.scaling()).detach()),
            "similarity_fct": self.similarity_fct.__name__,
            "gather_across_devices": self.gather_across_devices,
            "cache_size": self.cache_size,
            "mini_batch_size": self.mini_batch_size,
            "document_ids": self.document_ids,
            **asdict(self.options),
        }

    @property
    def citation(self) -> str:
        """BibTeX, for the model card."""
        return """
@inproceedings{lindgren2021negativecache,
    title={Efficient Training of Retrieval Models using Negative Cache},
    author={Erik Lindgren and Sashank Reddi and Ruiqi Guo and Sanjiv Kumar},
    booktitle={Advances in Neural Information Processing Systems},
    volume={34},
    year={2021}
}
"""

    def _forget_other_models(self) -> None:
        """Begins anew, scale included, where the trainer has made another model: by `model_init`, in each trial."""
        model = unwrapped(self.model)
        if model is not self._made_by[0]:
            self._made_by = (model,)
            self._cache = self._documents = None
            if self.scaling.logarithm is not None:
                fresh = Scale(self.scaling.fixed, learnable=True)
                self.scaling.load_state_dict(fresh.state_dict())

    def _step(self, queries: Tensor, documents: Rows, ids: Tensor) -> Tensor:
        state, rows = cast(TensorDictBase, self.state), documents["input_ids"].shape[0]
        scale = self.scaling(all_ranks())
        options = self.options if self.group is None else self.options.with_batch_of_all_ranks()
        weight, fewer = dimensions(self.calculate_loss, queries.shape[1])
        normal = is_decorated(self.calculate_loss) or self.similarity_fct is cos_sim
        unit: Callable[[Tensor], Tensor] = normalized if normal else _same
        truncated = [Truncated(state, queries, size, ids, scale, options, self.group) for size, _ in fewer]
        embedded: list[Tensor] = []

        def encode(features: Rows) -> Tensor:
            """What `step_` asks for, and in its first call also the draws in fewer dimensions."""
            if embedded:
                return unit(self._embed(cast(Texts, self._documents), features))
            parts = [features, *(part.features for part in truncated)]
            together = {key: torch.cat([part[key] for part in parts]) for key in features}
            embeddings = self._embed(cast(Texts, self._documents), together)
            split = torch.split(embeddings, [part["input_ids"].shape[0] for part in parts])
            embedded.extend([split[0][:rows], *split[1:]])
            return unit(split[0])

        out = step_(state, unit(queries), documents, encode, options=options, scale=scale, ids=ids, group=self.group)
        self.metrics = out.metrics
        total = weight * out.loss
        for part, (_, its_weight), negatives in zip(truncated, fewer, embedded[1:], strict=True):
            total = total + its_weight * part.loss(queries, embedded[0], negatives)
        return total

    def _embed(self, texts: Texts, rows: Rows) -> Tensor:
        """[N, D], in mini-batches of texts of similar length."""
        size, count = self.mini_batch_size, rows["input_ids"].shape[0]
        if size is None or count <= size:
            return _embedded(self.model, texts, rows)
        order = rows["attention_mask"].sum(1).argsort(stable=True)
        rows = {key: values[order] for key, values in rows.items()}
        model, parts = self.model, list[Tensor]()
        if isinstance(model, DistributedDataParallel):
            # Computing again in the backward pass must not go through the wrapper, but it has to be called once, which
            # prepares it for gradients: with the shortest texts.
            parts.append(_embedded(model, texts, {key: values[:size] for key, values in rows.items()}))
            rows = {key: values[size:] for key, values in rows.items()}
            model = cast(nn.Module, model.module)
        parts.append(chunked(partial(_embedded, model, texts), size)(rows))
        return torch.cat(parts)[order.argsort()]

    def _texts_of(self, column: Mapping[str, Any], width: int | None = None) -> Texts:
        left, padding = self._padding
        return Texts.of(column, width=width, left=left and "offsets" not in column, padding=padding)

    def _empty_cache(self, queries: Tensor, documents: Rows) -> TensorDictBase:
        capacity, seed = self.cache_size, self.seed
        if self.group is not None:
            multiple = SHARD_MULTIPLE * self.group.size()
            capacity = local_capacity(-(-capacity // multiple) * multiple, self.group)
        elif (ranks := all_ranks()) is not None:
            seed += ranks.rank()  # caches of their own, draws of their own
        return init_cache(
            capacity,
            queries.shape[1],
            documents,
            embedding_dtype=self.embedding_dtype,
            seed=seed,
            device=queries.device,
        )

    def _ids(self, documents: Rows, labels: Tensor | None, columns: int) -> Tensor:
        if self.document_ids == "tokens":
            return content_ids(documents)
        count = documents["input_ids"].shape[0]
        batch = count // columns
        shape = None if labels is None else tuple(labels.shape)
        if labels is None or labels.is_floating_point() or shape not in ((batch,), (batch, columns)):
            found = "None" if labels is None else f"{shape} {labels.dtype}"
            raise ValueError(
                f"labels are {found}; expected integers [{batch}] or [{batch}, {columns}], the ids of the documents, "
                f'as document_ids="labels"'
            )
        given = labels.long()
        if given.ndim == 2:
            return given.t().flatten()
        return torch.cat([given, given.new_full((count - batch,), -1)])


def _embedded(model: nn.Module, texts: Texts, rows: Rows) -> Tensor:
    return cast(Tensor, model(texts.batch(rows))["sentence_embedding"])


def _same(embeddings: Tensor) -> Tensor:
    return embeddings


def all_ranks() -> dist.ProcessGroup | None:
    """Of the process, if there are several."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None


def _width(model: SentenceTransformer, max_length: int | None) -> int:
    longest = max_length or model.max_seq_length
    if not isinstance(longest, int):
        raise ValueError(
            f"max_length is {max_length} and the model's max_seq_length {longest}; expected one of them to be a number "
            f"of tokens, the room for a document in the cache"
        )
    return longest


def _padding(model: SentenceTransformer) -> tuple[bool, int]:
    """Whether the tokenizer pads on the left, and with what."""
    tokenizer = getattr(model[0], "tokenizer", None)
    return getattr(tokenizer, "padding_side", "right") == "left", getattr(tokenizer, "pad_token_id", None) or 0
