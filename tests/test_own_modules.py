import pytest
import torch

from tests.conftest import TINY, run_cli, run_here
from tests.test_command_line import results

LAYER = """
from torch import nn
import my_sizes

class Net(nn.Sequential):
    def __init__(self, input_shape):
        super().__init__(nn.Flatten(), nn.Linear(my_sizes.inputs, my_sizes.outputs, bias=False))
"""


def test_modules_of_the_current_folder_are_imported_where_the_configuration_names_them_alone(tmp_path):
    """Ones with names of installed packages; ones that libraries would import if they were there; plug-ins of Hydra."""
    (tmp_path / "hydra_plugins").mkdir()
    others = ("random", "torch", "json", "lightning", "pandas", "onnx", "transformers", "colorlog", "my_other")
    for name in (*others, "hydra_plugins/mine", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open('imported-{name.partition('/')[0]}', 'w')")
    (tmp_path / "my_network.py").write_text(LAYER)
    (tmp_path / "my_sizes.py").write_text("inputs, outputs = 64, 20")
    own = ["network._target_=my_network.Net", "~network.output_size"]
    run_cli(*TINY, *own, "hydra.run.dir=run", cwd=tmp_path)
    assert results(tmp_path / "run")["mask_bytes_per_task"] == 64 * 20 // 8
    assert not list(tmp_path.glob("imported-*"))


@pytest.mark.parametrize(
    "options",
    [
        ["data.stream.source._target_=my_data.read"],
        ["network=torchvision", "network.name=resnet18", "network.weights=weights.pt", "method.weights=keep"],
    ],
    ids=["data", "weights"],
)
def test_a_refused_pickle_is_not_to_be_trusted(options, tmp_path, monkeypatch, capsys):
    torch.save({"weight": print}, tmp_path / "weights.pt")
    (tmp_path / "my_data.py").write_text("import torch\ndef read(): return torch.load('weights.pt', weights_only=True)")
    with pytest.raises(SystemExit):
        run_here(monkeypatch, tmp_path, *TINY, *options)
    said = capsys.readouterr().err
    assert "could run any program" in said
    assert "weights_only" not in said
