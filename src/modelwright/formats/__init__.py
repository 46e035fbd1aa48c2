"""Formats of others: a model's layers as their tools store them, and folders of theirs as layers of ours.

    import modelwright as mw

    mw.export("small/", save="small-gptq/", form="gptq")

One file for each format. Those of whole folders, read and written, are a `Layout` (`_layout`): GPTQ's, AWQ's and bitsandbytes'.
They keep the codes and scales that the model has, so that its weights stay what they are. GGUF is one file, of any dense or stored
weights, which its blocks round anew (`gguf`), and which is read as dense weights (`gguf_read`).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright.core.errors import SettingError, WeightsError, nearest

if TYPE_CHECKING:
    from modelwright.formats._layout import Layout

# The form that is asked for: the file here that writes it, and what that takes to know which of its kinds it is.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq", {}), "gptq_v2": ("gptq", {"version": 2}), "awq": ("awq", {}), "bitsandbytes": ("bitsandbytes", {}),
    **{f"gguf-{preset}": ("gguf", {"preset": preset}) for preset in ("f32", "f16", "bf16", "q8_0", "q6_k", "q4_0", "q4_k_m")},
}  # fmt: skip
READ = {"gptq": "gptq", "awq": "awq", "bitsandbytes": "bitsandbytes"}  # `quant_method` in a config: the file that reads it


def export(model: Any, save: str | Path, form: str, *, overwrite: bool = False) -> Path:
    """Write a model in the format of another tool.

    model: a model, a module or a folder. form: `gptq`, `gptq_v2`, `awq` or `bitsandbytes`, whose layers must be stored in a way that the
    format can hold, as `quantize.*` leaves them; or `gguf-q8_0`, `gguf-q6_k`, `gguf-q4_0`, `gguf-q4_k_m`, `gguf-f16`, `gguf-bf16` or
    `gguf-f32` for any model of Llama's layout. The tokenizer's files go along.

    Returns the folder.
    Raises ModelError, before anything is written, naming the layers and settings that the format cannot hold.
    """
    if form not in FORMS:
        raise SettingError(f"form is one of {', '.join(FORMS)}; got {form!r}.{nearest(str(form), FORMS)}")
    from modelwright.core.files import refuse_existing, refuse_inputs, whole_folder
    from modelwright.core.model import open

    opened, out = open(model), Path(save)
    refuse_existing(out, overwrite=overwrite)
    refuse_inputs(out, opened.sources)
    file, settings = FORMS[form]
    result = import_module(f"{__name__}.{file}").writer(opened, **settings)
    with whole_folder(out, overwrite=overwrite) as folder:
        opened.save_beside(folder)
        result.write(folder)
    return out


def reader(method: str | None) -> Layout | None:
    """What reads folders whose config names this `quant_method`; None where nothing here does."""
    return import_module(f"{__name__}.{READ[method]}").LAYOUT if method in READ else None


def gguf_file(source: str | Path) -> Path | None:
    """The GGUF file that a source names: itself, or the only one in a folder without safetensors; None where it names none.

    Raises:
        WeightsError: there is no such file.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = [] if any(path.glob("*.safetensors")) else list(path.glob("*.gguf"))
        return found[0].absolute() if len(found) == 1 else None
    if path.suffix.lower() != ".gguf":
        return None
    if not path.is_file():
        from modelwright.core.hub import nearest_path

        raise WeightsError(f"A model at {source} was asked for, but there is no such file.{nearest_path(str(source))}")
    return path.absolute()
