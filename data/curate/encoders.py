"""What vision models tell of images: embeddings, and the probability of a label."""

import base64
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification

from grpo.pretrained import load_image_processor

Measure = Callable[[Sequence[Image.Image]], list[Any]]
"""Images -> a value for each, None where the model's output is not finite."""


def load_encoder(path: str, device: torch.device) -> Measure:
    """Embeddings of length 1, in base64 of float16. Raises ValueError if the model is none that
    sees images."""
    model, pixels_of = _load(AutoModel, path, device)

    @torch.no_grad()
    def embed(images: Sequence[Image.Image]) -> list[str | None]:
        see = model.get_image_features if hasattr(model, "get_image_features") else model
        out = see(pixel_values=pixels_of(images))
        pooled = getattr(out, "pooler_output", None)
        pooled = out.last_hidden_state.mean(1) if pooled is None else pooled
        vectors = F.normalize(pooled.flatten(1).float(), dim=-1).half().cpu().numpy()
        return [base64.b64encode(vector.tobytes()).decode() if np.isfinite(vector).all() else None
                for vector in vectors]

    return embed


def load_classifier(path: str, label: str, device: torch.device) -> Measure:
    """Probabilities of the label. Raises ValueError if the model has none of that name."""
    model, pixels_of = _load(AutoModelForImageClassification, path, device)
    labels = model.config.id2label
    places = [int(place) for place, name in labels.items() if name == label]
    if not places:
        raise ValueError(f"{path}: expected the label {label!r}, "
                         f"found {list(labels.values())[:20]}")

    @torch.no_grad()
    def classify(images: Sequence[Image.Image]) -> list[float | None]:
        logits = model(pixel_values=pixels_of(images)).logits.float()
        probs = logits.softmax(-1)[:, places[0]].tolist()
        return [round(prob, 5) if math.isfinite(prob) else None for prob in probs]

    return classify


def _load(kind: Any, path: str,
          device: torch.device) -> tuple[Any, Callable[[Sequence[Image.Image]], Tensor]]:
    """The model, and the function that makes its input of images."""
    try:
        model, report = kind.from_pretrained(path, use_safetensors=True, trust_remote_code=False,
                                             output_loading_info=True)
        # transformers draws what is missing at random, anew on each rank.
        if missing := [key for key in report["missing_keys"] if not key.startswith("pooler.")]:
            raise ValueError(f"no weights for {min(missing)} in it")
        if report["missing_keys"]:  # of a ViT that was tuned as a classifier
            model.pooler = None
        processor = load_image_processor(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{path}: expected a vision model ({reason})") from None

    def pixels_of(images: Sequence[Image.Image]) -> Tensor:
        pixels = processor(images=list(images), return_tensors="pt").pixel_values
        return pixels.to(device, model.dtype)

    return model.to(device).eval(), pixels_of
