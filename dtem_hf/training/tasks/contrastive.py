"""Task `contrastive`: the merged image encoder of CLIP or SigLIP learns the unmerged similarities to captions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForZeroShotImageClassification

from ...data.captioned_images import CaptionCollate
from ...errors import BadValue
from ...hub.client import cached_commit
from ...models.attach import attach
from ...models.auto import load_whole
from ...models.distances import kl_to
from ...models.install import detach
from ...programs.identity import weights_digest
from ..task_arguments import TaskArguments
from .base import TaskData
from .caption_task import CaptionTask


_KNOWN = ("clip", "siglip")


class Contrastive(CaptionTask):
    """Only the image encoder learns; text encoder and projections are frozen. Each caption is embedded once.

    A share `distillation_weight` of the loss is the divergence of a batch's image-caption similarities from the
    unmerged ones; the rest is the model's own contrastive loss.
    """

    name: ClassVar[str] = "contrastive"
    ranked_by = "similarity_kl"

    def __init__(self, arguments: TaskArguments) -> None:
        super().__init__(arguments)
        given = arguments.distillation_weight
        self.weight = 1.0 if given is None else given
        if not self.weight:  # the loss does not use the unmerged similarities
            self.ranked_by = "contrastive"

    def load_model(self) -> Any:
        """The vision part of a dual encoder; the task keeps the rest."""
        a = self.arguments
        config = AutoConfig.from_pretrained(a.model, trust_remote_code=False)
        if config.model_type not in _KNOWN:
            raise BadValue("model", a.model, f"a dual encoder ({', '.join(_KNOWN)}), not {config.model_type}")
        self.whole = load_whole(AutoModelForZeroShotImageClassification, a.model, config=config)
        self.whole.requires_grad_(False).eval()
        # SigLIP scores each pair of image and caption separately, by a sigmoid with a bias.
        self.siglip = hasattr(self.whole, "logit_bias")
        self._embedded: dict[str, dict[int, Tensor]] = {"train": {}, "validation": {}}
        encoder = attach(self.whole.vision_model, a.merge_config())
        encoder.name_or_path = self.whole.name_or_path
        encoder.config._commit_hash = cached_commit(a.model)
        return encoder

    def load_data(self, model: Any) -> TaskData:
        data = super().load_data(model)
        data.identity["model's text encoder"] = weights_digest(self.whole.text_model.state_dict())
        return data

    def make_collate(self, tokenizer: Any) -> CaptionCollate:
        longest = self.whole.config.text_config.max_position_embeddings
        if self.siglip:  # SigLIP was trained on texts padded to one length, and attends to the padding
            return CaptionCollate(tokenizer, {"max_length": longest, "padding": "max_length"})
        length = min(self.arguments.max_caption_tokens, longest)
        return CaptionCollate(tokenizer, {"max_length": length, "padding": True})

    def loss(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        weight, texts = self.weight, self._texts("train", batch)
        similarities = self._similarities(model(pixel_values=batch["pixel_values"]).pooler_output, texts)
        loss = similarities.new_zeros(())
        if weight < 1:
            loss = loss + (1 - weight) * contrastive_losses(similarities, self.siglip).mean()
        if weight > 0:
            target = self._unmerged_similarities(plain_model, batch, texts)
            loss = loss + weight * similarity_divergence(target, similarities, self.siglip).mean()
        return loss

    def reference(self, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        return self._unmerged_similarities(plain_model, batch, self._texts("validation", batch))

    def figures(self, model: Any, batch: dict[str, Tensor], reference: Tensor) -> dict[str, Tensor]:
        """Divergence from the unmerged similarities, the contrastive loss, and retrieval within a batch (%).

        `recall`: whether an image finds its own caption; `agreement`: whether it finds the caption that the unmerged
        model finds.
        """
        texts = self._texts("validation", batch)
        similarities = self._similarities(model(pixel_values=batch["pixel_values"]).pooler_output, texts)
        found, own = similarities.argmax(-1), torch.arange(len(similarities), device=similarities.device)
        return {
            "similarity_kl": similarity_divergence(reference, similarities, self.siglip),
            "contrastive": contrastive_losses(similarities, self.siglip),
            "recall": 100.0 * (found == own),
            "agreement": 100.0 * (found == reference.argmax(-1)),
        }

    def save_model(self, model: Any, folder: Path) -> None:
        """Write the dual encoder with the merged, trained vision part."""
        encoder = self.whole.vision_model
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

    @torch.no_grad()
    def _texts(self, split: str, batch: dict[str, Tensor]) -> Tensor:
        """Normalised embeddings of a batch's captions, [B, P], float32; each caption is embedded once."""
        known, ids, device = self._embedded[split], batch["caption_id"].tolist(), batch["pixel_values"].device
        new = [place for place, i in enumerate(ids) if i not in known]
        if new:
            names = ("input_ids",) if self.siglip else ("input_ids", "attention_mask")
            output = self.whole.to(device).get_text_features(**{name: batch[name][new] for name in names})
            embeddings = F.normalize(getattr(output, "pooler_output", output).float(), dim=-1).cpu()
            known.update({ids[place]: row for place, row in zip(new, embeddings, strict=True)})
        return torch.stack([known[i] for i in ids]).to(device)


def contrastive_losses(similarities: Tensor, siglip: bool) -> Tensor:
    """The model's own loss per image: [images, captions] -> [images]; its mean is CLIP's or SigLIP's loss."""
    if siglip:
        signs = 2 * torch.eye(len(similarities), device=similarities.device) - 1
        return -F.logsigmoid(signs * similarities).sum(dim=-1)
    own = torch.arange(len(similarities), device=similarities.device)
    by_image = F.cross_entropy(similarities, own, reduction="none")
    return (by_image + F.cross_entropy(similarities.T, own, reduction="none")) / 2


def similarity_divergence(target: Tensor, similarities: Tensor, siglip: bool) -> Tensor:
    """Divergence from the unmerged similarities per image: [images, captions] twice -> [images], in nats.

    CLIP's similarities are distributions over captions and over images: the mean of the two KL divergences. SigLIP's
    are independent probabilities: the sum of their KL divergences.
    """
    if not siglip:
        return (kl_to(target, similarities) + kl_to(target.T, similarities.T)) / 2
    yes = target.sigmoid()
    cross = F.binary_cross_entropy_with_logits(similarities, yes, reduction="none")
    return (cross - F.binary_cross_entropy_with_logits(target, yes, reduction="none")).sum(dim=-1)
