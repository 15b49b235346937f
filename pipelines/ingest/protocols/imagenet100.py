"""ImageNet-100: 100 classes of ILSVRC 2012, by the lists of thuml/HashNet.

    train.txt, test.txt, database.txt       the lists; `image/<synset>_<n>.JPEG` are training images of ILSVRC,
                                            `val_image/ILSVRC2012_val_<n>.JPEG` validation images
    image/, val_image/                      the images, in the folders of HashNet's archive
    or train/<synset>/, val/                the images, in the folders of ILSVRC's Data/CLS-LOC

The lists of thuml/HashNet, yuanli2333/Hadamard-Matrix-for-hashing (CSQ; its test.txt lacks 17 lines) and
swuxyj/DeepHash-pytorch name the same images. `imagenet100-h2q` uses them like the code of H2Q and of HHNet.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import InputError
from pipelines.ingest.protocols.lists import Line, Listed
from pipelines.ingest.sources import make_printable

SYNSETS = (
    *("n01514668", "n01537544", "n01560419", "n01629819", "n01632458", "n01664065", "n01685808", "n01687978"),
    *("n01698640", "n01729322", "n01774750", "n01797886", "n01819313", "n01828970", "n01944390", "n01986214"),
    *("n02017213", "n02018207", "n02077923", "n02088466", "n02093256", "n02094114", "n02096177", "n02096294"),
    *("n02097209", "n02098105", "n02102177", "n02105162", "n02106550", "n02111129", "n02111277", "n02113023"),
    *("n02128385", "n02256656", "n02281787", "n02346627", "n02391049", "n02408429", "n02415577", "n02454379"),
    *("n02488291", "n02526121", "n02655020", "n02834397", "n02840245", "n02841315", "n02865351", "n02871525"),
    *("n02895154", "n02939185", "n02948072", "n02965783", "n02992211", "n03018349", "n03045698", "n03047690"),
    *("n03196217", "n03223299", "n03272562", "n03291819", "n03345487", "n03445924", "n03483316", "n03584829"),
    *("n03680355", "n03690938", "n03733131", "n03743016", "n03803284", "n03814639", "n03838899", "n03857828"),
    *("n03891332", "n03895866", "n03899768", "n03902125", "n03944341", "n04026417", "n04153751", "n04201297"),
    *("n04238763", "n04254120", "n04344873", "n04350905", "n04366367", "n04404412", "n04417672", "n04435653"),
    *("n04486054", "n04548362", "n04560804", "n04579432", "n04596742", "n07583066", "n07584110", "n07753113"),
    *("n07754684", "n07836838", "n12057211", "n13044778"),
)
"""Classes of the lists' columns: all training images with a 1 in a column are of this synset."""

_IMAGE = re.compile(r"(?:image/(n\d{8})_\d+|val_image/ILSVRC2012_val_\d{8})\.JPEG")


@dataclass(frozen=True, kw_only=True)
class Imagenet100(Listed):
    """A protocol of ImageNet-100."""

    classes: tuple[str, ...] = SYNSETS

    def locate(self, root: Path) -> Callable[[str], str]:
        """Return the path unchanged if `root` has the folder `image`, else the place of the image in ILSVRC."""
        return str if (root / "image").is_dir() else _in_ilsvrc

    def check(self, line: Line) -> None:
        """Raise InputError unless the line has one class, which must be the synset in the name if it has one."""
        match = _IMAGE.fullmatch(line.path)
        labels = [self.classes[column] for column in line.labels]
        if match is None or len(labels) != 1:
            raise InputError(
                f"{line.where}: {make_printable(line.path)} with {len(labels)} labels, expected is one label of "
                f"an image image/<synset>_<n>.JPEG or val_image/ILSVRC2012_val_<n>.JPEG"
            )
        if match[1] not in (None, labels[0]):
            raise InputError(f"{line.where}: {line.path} is labelled {labels[0]}: the classes are others than known")


def _in_ilsvrc(path: str) -> str:
    folder, name = path.split("/")
    return f"val/{name}" if folder == "val_image" else f"train/{name.partition('_')[0]}/{name}"


_TRAIN = "0a3d2740ab489f96c32ff1a3b5750954fc9cfc86634cfe83e0bf8bc305c15e38"
_DATABASE = "bce204336e94e7437419574b429f56dfcf489640f2752a442606ee48b1a6fdfb"

PROTOCOLS = (
    Imagenet100(
        name="imagenet100",
        parts={"train": 13_000, "query": 5_000, "database": 115_503},
        keys={
            "train": _TRAIN,
            "query": "0e8d3bab83a7a03c25a36a789f6e6da13580d6dcc357f222a35f1e20d796894e",
            "database": _DATABASE,
        },
    ),
    Imagenet100(
        name="imagenet100-h2q",
        parts={"train": 13_000, "query": 2_500, "val": 2_500, "database": 115_503},
        keys={
            "train": _TRAIN,
            "query": "749c0a648dcc94ad39cc0b6c627b423a39c297260c0ab8070688291d6858337d",
            "val": "072834ca96d492afe6657df2c8f17becbed7d6e01c1851e1a5c0a49194b3679e",
            "database": _DATABASE,
        },
        halves=True,
    ),
)
