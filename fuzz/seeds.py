"""Writes the corpus: a small file or two of every format, as the package or its peers write them, and `damaged` ones.

Each of those once led a reader to take memory or time that its bytes are not worth, or to raise what is no sentence.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from antibackdoor.data.arrays import write_npz
from antibackdoor.data.core import Data, Spec, Splits
from antibackdoor.files import save_state, write_csv
from antibackdoor.models import create
from antibackdoor.runs import save_model

CORPUS = Path(__file__).parent / "corpus"
PIXELS = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 1, 3, 4)
SERIES = np.arange(2 * 6, dtype=np.float32).reshape(2, 1, 6) / 7
SERIES[1, :, 4:] = 0


def seed(target: str, name: str, content: bytes | str) -> Path:
    """One file of the corpus."""
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def image(form: str, mode: str = "RGB", **options: object) -> bytes:
    """A few pixels of noise."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 5, 3), dtype=np.uint8)).convert(mode).save(
        buffer, form, **options
    )
    return buffer.getvalue()


def array(value: np.ndarray) -> bytes:
    """One .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()


def main() -> None:
    """All of it."""
    images_and_series()
    containers()
    documents()
    folders_and_runs()
    damaged()


def images_and_series() -> None:
    """Files of single samples, arrays, and text."""
    for mode in ("RGB", "L", "P", "RGBA", "1"):
        seed("png", mode, image("PNG", mode))
    deep = io.BytesIO()
    Image.fromarray(np.arange(30, dtype=np.uint16).reshape(6, 5) * 2000).save(deep, "PNG")
    seed("png", "deep", deep.getvalue())
    seed("jpeg", "plain", image("JPEG"))
    seed("jpeg", "progressive", image("JPEG", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0", comment=b"c"))
    seed("webp", "lossy", image("WEBP"))
    seed("webp", "lossless", image("WEBP", lossless=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"))
    seed("bmp", "rgb", image("BMP"))
    seed("bmp", "palette", image("BMP", "P"))
    seed("ppm", "color", image("PPM"))
    seed("ppm", "gray", image("PPM", "L"))
    seed("ppm", "plain", "P3 2 2 255\n0 0 0 255 255 255 # c\n9 9 9 1 2 3\n")
    seed("manifest", "plain", "path,label,split\na.png,x,train\nb.png,y,train\n")
    seed("manifest", "test", 'path,label,split\n"a.png",x,train\nb.png,"x",test\n')
    spec = Spec("series", (1, 6), ("a", "b"), 0.0, 2.0)
    series = Data(torch.from_numpy(SERIES), torch.tensor([0, 1]), spec, ["0", "1"], torch.tensor([6, 4]))
    images = Data(torch.from_numpy(PIXELS), torch.tensor([0, 1]), Spec("image", (1, 3, 4), ("a", "b")), ["p", "q"])
    for name, data in (("series", series), ("images", images)):
        path = seed("npz", name, b"")
        path.unlink()
        write_npz(path, Splits(data))
    seed("npy", "images", array(PIXELS.transpose(0, 2, 3, 1)))
    seed("npy", "series", array(SERIES))
    seed("npy", "objects", array(np.zeros(2, np.float32)))
    head = "@problemName p\n@timeStamps false\n@missing false\n@univariate {}\n@equalLength {}\n"
    head += "@classLabel true a b\n@data\n"
    seed("ts", "one", head.format("true", "true") + "1,2,3:a\n4,5,6.5:b\n")
    seed("ts", "two", head.format("false", "false") + "1,2,3:4,5,6:a\n4,5:?,1e3:b\n")
    seed(
        "ts", "stamps", head.replace("timeStamps false", "timeStamps true").format("true", "false") + "(0,1),(1,2):a\n"
    )
    seed("recording", "plain", "x,y\n0.5,1e3\n-2,\n")
    seed("recording", "stamped", 'time,"x",y\n2026-01-01 00:00,0.5,1\n2026-01-01 00:01,NA,2\n')
    seed("recording", "semicolons", "x;y\n0,5;1\n")
    seed("recording", "blanks", "1 2\n3 4\n")
    seed("table", "wide", "label,a,b\nx,1,1e3\ny,-2,\n")
    seed("table", "long", "id,label,time,u,v\np,x,0,1,2\np,x,1,3,4\nq,y,0,5,\nq,y,1,NA,7\n")
    seed("table", "splits", 'id;split;label;"u"\np;train;x;0,5\nq;test;x;1\n')
    seed("tsv", "plain", "1\t0.5\t0.25\t1e3\n2\t1\t-2\tNaN\n")
    seed(
        "arff",
        "one",
        "@relation r\n@attribute a1 numeric\n@attribute a2 numeric\n@attribute c {a,b}\n@data\n1,2,a\n3,?,b\n",
    )
    seed(
        "arff", "two", "@relation r\n@attribute b relational\n@attribute c {a,b}\n@data\n'1,2\\n3,4',a\n'5,6\\n7,8',b\n"
    )


def containers() -> None:
    """Tables and archives."""
    png = image("PNG")
    tables = {
        "images": pa.table({"image": [{"bytes": png, "path": "a"}, {"bytes": png, "path": "b"}], "label": [0, 1]}),
        "binary": pa.table({"image": [png, png], "label": ["a", "b"]}),
        "series": pa.table({"series": [[1.0, 2.0], [3.0, 4.0]], "label": [0, 1]}),
        "channels": pa.table({"x": [[[1.0, 2.0], [0.0, 1.0]], [[3.0], [4.0]]], "label": ["a", "b"]}),
    }
    for name, table in tables.items():
        sink = io.BytesIO()
        pq.write_table(table, sink)
        seed("parquet", name, sink.getvalue())
        for form, make in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
            sink = io.BytesIO()
            with make(sink, table.schema) as writer:
                writer.write_table(table)
            seed("arrow", f"{name}-{form}", sink.getvalue())
    for name, members in (
        ("images", [("a.png", png), ("a.cls", b"0"), ("b.png", png), ("b.json", b'{"label": 1}')]),
        (
            "series",
            [("d/a.npy", array(SERIES[0])), ("d/a.cls", b"u"), ("d/b.npy", array(SERIES[1])), ("d/b.txt", b"v")],
        ),
        ("long", [("n" * 150 + ".png", png), ("n" * 150 + ".cls", b"1")]),
    ):
        for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
            sink = io.BytesIO()
            with tarfile.open(fileobj=sink, mode="w", format=form) as archive:
                for member, content in members:
                    told = tarfile.TarInfo(member)
                    told.size = len(content)
                    archive.addfile(told, io.BytesIO(content))
            seed("tar", f"{name}-{form}", sink.getvalue().rstrip(b"\0") + bytes(1024))


def documents() -> None:
    """Models, settings, and the files of a run."""
    torch.manual_seed(0)
    folder = CORPUS / "model"
    folder.mkdir(parents=True, exist_ok=True)
    spec = Spec("image", (3, 8, 8), ("a", "b"))
    save_model(folder, create("resnet18-w1", spec), "resnet18-w1", spec)
    seed("card", "plain", (folder / "model.json").read_bytes())
    seed("weights", "plain", (folder / "model.safetensors").read_bytes())
    shutil.rmtree(folder)
    path = seed("state", "plain", b"")
    save_state(
        path, {"fit": {"epoch": 2, "w": torch.ones(2), "list": [1, None, "a", True]}, "history": [{"loss": 0.5}]}
    )
    seed("json", "plain", '{"a": [1, 2.5, null, true, "\\u00e9"], "b": {"c": -1e-3}}')
    seed("settings", "plain", 'epochs = 3\nimage-size = 32\ndefense = "none"\n[set]\nmain.epochs = 2\nrate = 0.5\n')
    seed(
        "grid",
        "plain",
        '[profile.quick]\nepochs = 1\n[[cells]]\ndata = ["digits"]\nattacks = ["badnets", {name = '
        '"blend", options = {rate = 0.2}, label = "B", x = 1}]\nrates = [0.1]\ndefenses = ["none"]\nseeds = [0]\n'
        '[[override]]\nwhere = {data = "digits"}\nset = {epochs = 2}\n[[exclude]]\nwhere = {attack = ["blend"]}\n'
        'reason = "r"\n[[table]]\nid = "t"\n',
    )
    seed("truth", "plain", "id,role,label,true_label,target\n0,clean,0,0,1\n1,poison,1,0,1\n")
    table = pd.DataFrame(
        {
            "id": ["a/0.png", "=b"],
            "label": ["x", "y"],
            "score": [0.5, 0.25],
            "probability": [0.9, 0.1],
            "flagged": [True, False],
            "suggested_label": ["y", ""],
            "reason": ["learned early", ""],
        }
    )
    write_csv(seed("run_suspects", "plain", b""), table)
    seed(
        "run_verdict",
        "plain",
        json.dumps(
            {
                "poisoned": True,
                "confidence": 0.9,
                "target_classes": ["x"],
                "estimated_rate": 0.1,
                "evidence": ["Because."],
                "references": [],
            }
        ),
    )
    seed(
        "run_metrics",
        "plain",
        json.dumps(
            {
                "clean_accuracy": {"value": 0.5, "count": 1, "n": 2},
                "cost": {"seconds": 3, "steps": 10},
                "detection": {"auroc": 0.9},
            }
        ),
    )
    rows = [{"stage": "main", "epoch": k, "steps": k, "seconds": 0.1, "main_loss": 1 / k} for k in (1, 2)]
    seed("run_history", "plain", "".join(json.dumps(row) + "\n" for row in rows))
    gallery = io.BytesIO()
    np.savez(gallery, ids=np.array(["a/0.png", "=b"]), x=PIXELS.transpose(0, 2, 3, 1))
    seed("run_gallery", "plain", gallery.getvalue())


def archive(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive, the same in every year."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as out:
        for name, content in members:
            out.writestr(zipfile.ZipInfo(name), content, method)
    return sink.getvalue()


def folders_and_runs() -> None:
    """What lies beside the data and in folders: listings, decisions, records."""
    png = image("PNG")
    seed("folder", "classes", archive(("a/0.png", png), ("b/0.png", png), ("b/note.txt", b"x")))
    seed("folder", "splits", archive(("train/a/0.png", png), ("train/b/0.jpg", image("JPEG")), ("test/a/0.png", png)))
    seed("folder", "strange", archive(("train/0.png", png), ("a.npy", b"x"), ("state.json", b"{}")))
    seed("pack", "plain", '{"size": [4, 4], "counts": [2], "bad": [{}]}')
    seed("saved_state", "plain", '{"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": null}')
    seed("saved_splits", "plain", '{"splits": ["train"]}')
    seed("run_config", "plain", '{"data": "0123456789abcdef", "defense": "none", "seed": 0}')
    told = '"image_size": [4, 4], "missing": "zero", "skip_unreadable": true, "memory_map": false, "data_root": "/x"}'
    seed("run_source", "plain", '{"source": "data", "test": null, ' + told)
    seed("run_source", "test", '{"source": "data", "test": "data", ' + told)
    lines = ['{"id": "a/0.png", "decision": "drop"}', '{"id": "=b", "decision": "relabel", "label": "x"}']
    seed("review", "plain", "".join(line + "\n" for line in lines))
    maps = {name: np.ones((2, 3), np.float32) for name in ("suspects", "trusted")}
    maps |= {f"{name}_mean": np.ones((2, 3, 3), np.float32) for name in ("suspects", "trusted")}
    told = {"label": np.array("x"), "witness": np.array("second head"), "n": np.array(4)}
    seed("run_attention", "plain", archive(*((f"{k}.npy", array(v)) for k, v in {**maps, **told}.items())))
    share = {"value": 0.5, "count": 1, "n": 2}
    cell = {"data": "digits", "attack": "badnets", "attack_options": {"rate": 0.1}, "defense": "none", "model": "m"}
    measures = {"clean_accuracy": share, "attack_success_rate": share, "poisoned_samples": {"count": 1, "n": 2}}
    measures |= {"detection": {"flagged_precision": share}, "partitions": [{"epoch": 0, "precision_clean_set": share}]}
    record = {"cell": {**cell, "seed": 0, "defense_changes": {}}, "measures": measures, "cost": {"seconds": 1.5}}
    seed("ledger", "plain", json.dumps(record))


def damaged() -> None:
    """Files that once broke a reader."""

    def hollow(kind: str, shape: str) -> bytes:
        text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".ljust(69) + "\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()

    x, y = array(np.zeros((4, 4, 4, 3), np.uint8)), array(np.array([0, 1, 0, 1]))
    honest = (("x.npy", x), ("y.npy", y))
    seed("npz", "damaged-rows", archive(("x.npy", hollow("|u1", "(20000000, 0)")), ("y.npy", y)))
    seed("npz", "damaged-ids", archive(*honest, ("ids.npy", hollow("<U0", "(20000000,)"))))
    seed("npz", "damaged-classes", archive(*honest, ("classes.npy", hollow("<U0", "(20000000,)"))))
    many = array(np.zeros(20_000_000, np.uint8))
    seed("npz", "damaged-labels", archive(("x.npy", x), ("y.npy", many), method=zipfile.ZIP_DEFLATED))
    seed("npy", "damaged", hollow("|u1", "(20000000, 0)"))
    kind, count = pa.list_(pa.float32(), 0), 5_000_000
    lists = pa.Array.from_buffers(kind, count, [None], children=[pa.array([], pa.float32())])
    table, sink = pa.table({"series": lists, "label": pa.nulls(count)}), io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    seed("arrow", "damaged-lists", sink.getvalue())
    sink = io.BytesIO()
    pq.write_table(pa.table({"series": pa.array([np.zeros(20_000_000)]), "label": [0]}), sink, compression="zstd")
    seed("parquet", "damaged-zeros", sink.getvalue())
    scans = image("JPEG", progressive=True)
    last = scans[scans.rindex(b"\xff\xda") : -2]
    seed("jpeg", "damaged-scans", scans[:-2] + last * 2000 + scans[-2:])
    seed("tsv", "damaged-wide", "".join(f"{k}" + "\t1" * 15_000 + "\n" for k in (1, 2)))
    head = "@problemName p\n@timeStamps false\n@univariate false\n@equalLength false\n@classLabel true a b\n@data\n"
    seed("ts", "damaged-channels", head + "1," * 10_000 + "1" + ":1" * 10_000 + ":a\n")
    seed("ts", "damaged-header", head.replace("@data", "@\n" * 12_000 + "@data"))
    seed("ts", "damaged-label", head + "1:" + "a" * 4000 + "\n" + "1:b\n" * 5000)
    head = "@relation r\n@attribute a numeric\n@attribute c {x,y}\n@data\n"
    seed("arff", "damaged-lines", head + "1," * 10_000 + "x\n" + "1,x\n" * 2000)
    seed("manifest", "damaged-columns", "path,label" + ",x" * 10_000 + "\n" + "a.png,x\n" * 2000)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        for key in range(4):
            told = tarfile.TarInfo(f"{key}.npy")
            told.pax_headers = {"GNU.sparse.size": "60000000", "GNU.sparse.map": "0,0", "GNU.sparse.numblocks": "1"}
            out.addfile(told)
    seed("tar", "damaged-holes", buffer.getvalue().rstrip(b"\0") + bytes(1024))
    seed("saved_state", "damaged-files", '{"_data_files": 1}')
    seed("review", "damaged-depth", "[" * 60_000 + "\n")
    seed("run_config", "damaged-list", "[]")
    seed("run_source", "damaged-test", '{"source": "data", "test": 5}')
    seed("pack", "damaged-list", "[]")
    seed("pack", "damaged-size", '{"size": ["a", 1], "counts": [2], "bad": [{}]}')
    seed("pack", "damaged-rows", '{"size": [4, 4], "counts": [2], "bad": [{"99": "x"}]}')
    seed("ledger", "damaged-number", "3")
    seed("ledger", "damaged-cell", '{"measures": {}}')


if __name__ == "__main__":
    main()
