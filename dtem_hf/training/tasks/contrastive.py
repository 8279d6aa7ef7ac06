"""Image and text in one space (CLIP, SigLIP): merged images stay where the unmerged were among the captions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForZeroShotImageClassification

from ...data.captioned_images import CaptionCollate
from ...errors import BadValue
from ...models.attach import attach
from ...models.distances import kl_to
from ...models.install import detach
from .base import TaskData
from .captions import CaptionTask


if TYPE_CHECKING:
    from ..arguments import TrainArguments


class Contrastive(CaptionTask):
    """The image encoder learns against captions, whose embeddings are computed once; text and projections are frozen.

    The loss is `distillation_weight` of the divergence between unmerged and merged similarities of a batch's images
    and captions, and the rest the model's own contrastive loss.
    """

    name: ClassVar[str] = "contrastive"
    ranked_by = "similarity_kl"

    def __init__(self, arguments: TrainArguments) -> None:
        super().__init__(arguments)
        given = arguments.distillation_weight
        self.weight = 1.0 if given is None else given
        if not self.weight:  # then it is no aim to stay where the unmerged model is
            self.ranked_by = "contrastive"

    def load_model(self) -> Any:
        """The vision part of a dual encoder; the rest of it stays with the task."""
        a = self.arguments
        config = AutoConfig.from_pretrained(a.model, trust_remote_code=False)
        if not {"text_config", "vision_config"} <= set(config.sub_configs) or config.model_type not in _KNOWN:
            raise BadValue("model", a.model, f"a dual encoder ({', '.join(_KNOWN)}), not {config.model_type}")
        self.whole = AutoModelForZeroShotImageClassification.from_pretrained(a.model, config=config)
        self.whole.requires_grad_(False).eval()
        encoder = attach(self.whole.vision_model, a.merge_config())
        encoder.name_or_path = self.whole.name_or_path
        encoder.config._commit_hash = getattr(config, "_commit_hash", None)
        return encoder

    def load_data(self, model: Any) -> TaskData:
        data = super().load_data(model)
        self._text = {split: _Texts(self) for split in ("train", "validation")}
        return data

    def make_collate(self, tokenizer: Any) -> CaptionCollate:
        length = min(self.arguments.max_caption_tokens, self.whole.config.text_config.max_position_embeddings)
        # SigLIP was trained on texts that are padded to one length, and reads the padding.
        options = {"padding": "max_length"} if _is_siglip(self.whole) else {"padding": True}
        if _is_siglip(self.whole):
            length = self.whole.config.text_config.max_position_embeddings
        return CaptionCollate(tokenizer, {"max_length": length, **options})

    def loss(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        weight, texts = self.weight, self._text["train"](batch)
        similarities = self._similarities(model(pixel_values=batch["pixel_values"]).pooler_output, texts)
        loss = similarities.new_zeros(())
        if weight < 1:
            loss = loss + (1 - weight) * contrastive_losses(similarities, _is_siglip(self.whole)).mean()
        if weight > 0:
            target = self._unmerged_similarities(plain_model, batch, texts)
            loss = loss + weight * similarity_divergence(target, similarities, _is_siglip(self.whole)).mean()
        return loss

    def reference(self, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        return self._unmerged_similarities(plain_model, batch, self._text["validation"](batch))

    def figures(self, model: Any, batch: dict[str, Tensor], reference: Tensor) -> dict[str, Tensor]:
        """Divergence from the unmerged similarities, the contrastive loss, and retrieval within a batch (%).

        `recall` says whether an image finds its own caption, `agreement` whether it finds the one that it found
        unmerged.
        """
        texts, siglip = self._text["validation"](batch), _is_siglip(self.whole)
        similarities = self._similarities(model(pixel_values=batch["pixel_values"]).pooler_output, texts)
        found, own = similarities.argmax(-1), torch.arange(len(similarities), device=similarities.device)
        return {
            "similarity_kl": similarity_divergence(reference, similarities, siglip),
            "contrastive": contrastive_losses(similarities, siglip),
            "recall": 100.0 * (found == own),
            "agreement": 100.0 * (found == reference.argmax(-1)),
        }

    def save_model(self, model: Any, folder: Path) -> None:
        """The dual encoder, with what its vision part has learned."""
        whole, encoder = self.whole, self.whole.vision_model
        self.whole.vision_model = nn.Identity()
        try:
            whole = copy.deepcopy(self.whole)
        finally:
            self.whole.vision_model = encoder
        adapter = model.to_merge_adapter()
        whole.vision_model = detach(copy.deepcopy(model))
        super().save_model(attach(whole, adapter), folder)

    def _unmerged_similarities(self, plain_model: Any, batch: dict[str, Tensor], texts: Tensor) -> Tensor:
        output = self.unmerged(plain_model, pixel_values=batch["pixel_values"])
        return self._similarities(output.pooler_output, texts).detach()

    def _similarities(self, pooled: Tensor, texts: Tensor) -> Tensor:
        """Scaled cosines, [B, D] and normalised [B, P] -> [images, captions], float32."""
        project = getattr(self.whole, "visual_projection", None)
        images = pooled if project is None else project(pooled)
        scale, bias = self.whole.logit_scale.exp(), getattr(self.whole, "logit_bias", 0.0)
        return F.normalize(images.float(), dim=-1) @ texts.T * scale + bias


_KNOWN = ("clip", "siglip")


def _is_siglip(model: Any) -> bool:
    """Whether pairs of image and caption are judged one by one, by a sigmoid."""
    return hasattr(model, "logit_bias")


class _Texts:
    """Normalised embeddings of captions, each computed when it is first met."""

    def __init__(self, task: Contrastive) -> None:
        self.task = task
        self._known: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, P], float32, for the captions of a batch."""
        ids, device = batch["caption_id"].tolist(), batch["pixel_values"].device
        new = [place for place, i in enumerate(ids) if i not in self._known]
        if new:
            whole = self.task.whole.to(device)
            inputs = {"input_ids": batch["input_ids"][new]}
            if not _is_siglip(whole):
                inputs["attention_mask"] = batch["attention_mask"][new]
            output = whole.get_text_features(**inputs)
            embeddings = F.normalize(getattr(output, "pooler_output", output).float(), dim=-1).cpu()
            self._known.update({ids[place]: row for place, row in zip(new, embeddings, strict=True)})
        return torch.stack([self._known[i] for i in ids]).to(device)


def contrastive_losses(similarities: Tensor, siglip: bool) -> Tensor:
    """The model's own loss by image: [images, captions] -> [images], of which the mean is CLIP's, or SigLIP's."""
    if siglip:
        signs = 2 * torch.eye(len(similarities), device=similarities.device) - 1
        return -F.logsigmoid(signs * similarities).sum(dim=-1)
    own = torch.arange(len(similarities), device=similarities.device)
    by_image = F.cross_entropy(similarities, own, reduction="none")
    return (by_image + F.cross_entropy(similarities.T, own, reduction="none")) / 2


def similarity_divergence(target: Tensor, similarities: Tensor, siglip: bool) -> Tensor:
    """How far similarities are from unmerged ones, by image: [images, captions] twice -> [images], in nats.

    CLIP's are distributions over captions and over images: the mean of both KL divergences. SigLIP's are independent
    yes-or-no answers: the sum of theirs.
    """
    if not siglip:
        return (kl_to(target, similarities) + kl_to(target.T, similarities.T)) / 2
    yes = target.sigmoid()
    cross = F.binary_cross_entropy_with_logits(similarities, yes, reduction="none")
    return (cross - F.binary_cross_entropy_with_logits(target, yes, reduction="none")).sum(dim=-1)
