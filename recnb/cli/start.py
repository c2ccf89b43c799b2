"""`recnb start`: from a folder of photos to a trained model, a gallery, and a recogniser that knows their names."""

from pathlib import Path
from typing import Annotated

import typer


def start(
    folder: Annotated[Path, typer.Argument(help="A folder with a folder of photos for each product, person or logo.")],
    to: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("runs/mine"),
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|True|False", help="A file, True for the hub's, False for none; by default what there is."
        ),
    ] = None,
    backbone: Annotated[str | None, typer.Option(metavar="NAME", help="Another network of timm.")] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How long to train; by default as fits the photos.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(metavar="PIXELS", min=32, help="Size of the images; by default as fits the photos.")
    ] = None,
    tags: Annotated[Path | None, typer.Option(help="A CSV of labels to mend, as 04_gallery writes it.")] = None,
    opened: Annotated[bool, typer.Option("--open", help="Open the gallery in the browser at the end.")] = False,
) -> None:
    """Your own photos: prepare, train, evaluate, look, export.

    Runs the notebooks 01 to 05 into one folder, each left there as it was executed. Called again, it goes on where it
    stopped: what is done is not done again, and a training continues from its last checkpoint.
    """
    from recnb.cli.journey import Journey, summary, word

    given = {
        "weights": {None: None, "True": True, "False": False}.get(weights, weights and word(Path(weights).absolute())),
        "backbone": backbone,
        "epochs": epochs,
        "image_size": image_size,
        "tags": tags and word(tags.absolute()),
    }
    journey = Journey(folder, to, {name: value for name, value in given.items() if value is not None})
    journey.go()
    print("\n".join(summary(journey.to)))
    if opened:
        typer.launch((journey.to / "gallery.html").as_uri())
