"""What a GGUF file says about where it comes from, and how the model is meant to be sampled."""

from pathlib import Path

import gguf

from finemill.artifacts.model import read_merge
from finemill.models.base.resolve import hub_name
from finemill.models.sampling import number_of, read_generation_defaults


def add_origin(writer: gguf.GGUFWriter, folder: Path) -> None:
    """Write who made the file, from which base, and the sampling that generation_config.json of `folder` recommends."""
    writer.add_quantized_by("finemill")
    merge = read_merge(folder)
    on_hub = hub_name(merge.base_model) if merge else None
    if on_hub:
        organization, _, name = on_hub[0].partition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        writer.add_base_model_organization(0, organization)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{on_hub[0]}")
    generation = read_generation_defaults(folder)
    if generation.get("do_sample") is False:
        writer.add_sampling_temp(0.0)
        return
    for key, add in (
        ("temperature", writer.add_sampling_temp),
        ("top_p", writer.add_sampling_top_p),
        ("min_p", writer.add_sampling_min_p),
    ):
        if (value := number_of(generation, key)) is not None:
            add(value)
    if (top_k := number_of(generation, "top_k")) is not None:
        writer.add_sampling_top_k(int(top_k))
