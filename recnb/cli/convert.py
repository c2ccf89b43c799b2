"""`recnb convert`: weights of the original, written as this package's."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(help="A .pdparams file, of a backbone or of a whole model.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    config: Annotated[Path, typer.Option(help="The YAML file of the model.")],
    strict: Annotated[bool, typer.Option(help="Refuse a file that does not fit in full, its last layer apart.")] = True,
) -> None:
    """Convert PaddleClas's weights to safetensors.

    What comes of a whole model can be given as Global.pretrained_model, what comes of a backbone as
    Arch.Backbone.pretrained. Nothing in the file is run.
    """
    from recnb.models.paddle import read_pdparams
    from recnb.models.weights import load_weights, save_weights
    from recnb.recipe.model import build_model
    from recnb.recipe.schema import architectures, class_num, load_config
    from recnb.runs.folder import untrained

    cfg, arrays = untrained(load_config(config)), read_pdparams(source)
    whole = any("backbone." in name for name in arrays)
    if not whole:
        architectures(cfg)[0][1]["Backbone"] |= {"pretrained": str(source), "strict": strict}
    heads = [arrays[name].shape[-1] for name in ("head.weight", "head.fc.weight", "head.kernel") if name in arrays]
    model = build_model(cfg, class_num(cfg)[1] or next(iter(heads), 1))
    if whole:
        print(load_weights(model, source, str(config), strict))
    part = model if whole else model.get_submodule("backbone.model")
    save_weights(part.state_dict(), out)
    print(f"{out}: give it as {'Global.pretrained_model' if whole else 'Arch.Backbone.pretrained'}")
