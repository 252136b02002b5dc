"""docs/sampling.ipynb runs, and its pictures are those that its code makes.

python tests/test_notebook.py writes the pictures anew.
"""

import ast
import base64
import io
import json

import numpy as np
import tiny
from PIL import Image

NOTEBOOK = tiny.ROOT / "docs/sampling.ipynb"


def run(cells):
    """Run the code cells in order; yields (cell, its last expression's value)."""
    names = {}
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        body = ast.parse("".join(cell["source"])).body
        last = ast.Expression(body.pop().value) if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), str(NOTEBOOK), "exec"), names)
        yield cell, None if last is None else eval(compile(last, str(NOTEBOOK), "eval"), names)


def output(picture, number):
    """A picture as the output of the cell with this number."""
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    data = {"image/png": base64.b64encode(file.getvalue()).decode()}
    return {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}


def stored_picture(cell):
    return Image.open(io.BytesIO(base64.b64decode(cell["outputs"][0]["data"]["image/png"])))


def test_pictures_are_what_the_cells_make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = 0
    with tiny.one_thread():
        for cell, value in run(json.loads(NOTEBOOK.read_text())["cells"]):
            assert len(cell["outputs"]) == isinstance(value, Image.Image)
            if cell["outputs"]:
                made, stored = (np.asarray(picture).astype(int) for picture in (value, stored_picture(cell)))
                assert made.shape == stored.shape and np.abs(made - stored).mean() < 2  # grey levels: rounding
                pictures += 1
    assert pictures >= 4


def write():
    """Run the notebook and store its pictures."""
    notebook = json.loads(NOTEBOOK.read_text())
    for number, (cell, value) in enumerate(run(notebook["cells"]), 1):
        cell.update(execution_count=number, outputs=[] if value is None else [output(value, number)])
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write()
