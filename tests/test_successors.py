"""Oracle: figures that the authors' codes of five later searches computed in float64.

PC-DARTS, GDAS, DrNAS, FairDARTS and RobustDARTS (S1 to S4); golden/successors/README.md says which
code and what its figures mean. Whatever their codes drew at random is handed to ours.
"""

import re
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from darts_min.architect import architecture_gradient
from darts_min.judge.signs import largest_eigenvalue
from darts_min.relaxations import Dirichlet, Gumbel, Sigmoid, Softmax
from darts_min.spaces import SPACES
from darts_min.supernet import Supernet, edges_by_state

GOLDEN = Path(__file__).parent / "golden" / "successors"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CHANNELS_LAST_BY_DEFAULT = ["channels_last", pytest.param("contiguous", marks=pytest.mark.slow)]
ROBUST = tuple(f"robustdarts_{space}" for space in ("S1", "S2", "S3", "S4"))
FILES = ("pcdarts", "gdas", "drnas", "fairdarts", *ROBUST)

# Their layers -> ours: before a cell, of a separable convolution (a dilated one has the first two,
# without the number) and of a skip connection of stride 2.
PREPROCESS = {"op.1": "conv", "conv_1": "conv1", "conv_2": "conv2"}
LAYERS = {"op.1": "depthwise1", "op.2": "pointwise1", "op.5": "depthwise2", "op.6": "pointwise2"}
LAYERS |= {"conv_1": "conv1", "conv_2": "conv2"}
NAMES_OF_GDAS = {"op_a.op": "op", "op_b.op.1": "op.5", "op_b.op.2": "op.6"}
NAMES_OF_GDAS |= {"convs.0": "conv_1", "convs.1": "conv_2"}
OPERATION = re.compile(r"(cells\.\d+)\.(?:_ops\.(\d+)|edges\.(\d)<-(\d))\._ops\.(\d)\.(.+)\.weight")


def close(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-9, atol=1e-9)


def all_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        close(a, e)


def double(value):
    if isinstance(value, dict):
        return {key: double(item) for key, item in value.items()}
    if isinstance(value, list):
        return [double(item) for item in value]
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def load(file):
    return double(torch.load(GOLDEN / f"{file}.pt", weights_only=True))


def place(name, config):
    """Say where the weight of their `name` is: in which of ours, which part, of how many."""
    for theirs, usual in NAMES_OF_GDAS.items():
        name = name.replace(theirs, usual)
    if match := re.fullmatch(r"(cells\.\d+\.preprocess\d)\.(.+)\.weight", name):
        return f"{match[1]}.{PREPROCESS[match[2]]}.weight", 0, 1
    if not (match := OPERATION.fullmatch(name)):
        return name, 0, 1
    cell, edge, node, predecessor, column, layer = match.groups()
    edge = int(node) * (int(node) + 3) // 2 + int(predecessor) if edge is None else int(edge)
    operations = config["primitives"]
    if "choices" in config:  # on every edge its own; the same in all cells of a kind
        kind = int(cell.split(".")[1]) in (config["num_cells"] // 3, 2 * config["num_cells"] // 3)
        operations = config["choices"][kind][edge]
    op = operations[int(column)]
    layer = LAYERS[layer].rstrip("1") if op.startswith("dil") else LAYERS[layer]
    states = edges_by_state(config["num_nodes"])
    state = next(j for j, edges in enumerate(states) if edge in edges)
    ours = f"{cell}.mixed_ops.{state}.ops.{op}.{layer}.weight"
    return ours, states[state].index(edge), len(states[state])


def relaxation_of(config):
    if config["method"] == "gdas":
        return Gumbel(config["tau"])
    if config["method"] == "fairdarts":
        return Sigmoid(config["zero_one_weight"])
    return Dirichlet() if config["method"] == "drnas" else Softmax()


class Search:
    """Our supernet with their weights, which takes their steps and compares the figures."""

    def __init__(self, golden, layout="channels_last"):
        config = self.config = golden["config"]
        space = SPACES[config["space"]] if "space" in config else None
        model = self.model = Supernet(
            config["num_classes"],
            config["init_channels"],
            config["num_cells"],
            config["num_nodes"],
            primitives=config["primitives"] if space is None else space.primitives,
            choices=None if space is None else space.choices,
            partial=config.get("partial", 1),
        ).double()
        model.relaxation = relaxation_of(config)
        self.names, self.columns = golden["weight_names"], None
        if "choices" in config:  # their columns are an edge's own operations, ours all of them
            self.columns = [
                torch.tensor([[model.primitives.index(op) for op in edge] for edge in cell])
                for cell in config["choices"]
            ]
        with torch.no_grad():
            self.set_alphas(golden["alphas"])
            sizes = [torch.Size(shape).numel() for shape in golden["weight_shapes"]]
            weights = golden["weights"].split(sizes)
            for ours, theirs in zip(self.parts(model.weights()), weights, strict=True):
                ours.copy_(theirs.view_as(ours))
        model.to(memory_format=LAYOUTS[layout])
        self.w_optimizer = torch.optim.SGD(
            model.weights(),
            config["w_lr"],
            momentum=config["w_momentum"],
            weight_decay=config["w_weight_decay"],
            nesterov=config.get("w_nesterov", False),
        )
        self.alpha_optimizer = torch.optim.Adam(
            model.alphas(),
            config["alpha_lr"],
            betas=tuple(config["alpha_betas"]),
            weight_decay=config["alpha_weight_decay"],
        )
        self.drawn = iter(())

    def set_alphas(self, theirs):
        for kind, (alpha, values) in enumerate(zip(self.model.alphas(), theirs, strict=True)):
            if self.columns is None:
                alpha.data.copy_(values)
            else:
                alpha.data.scatter_(1, self.columns[kind], values.to(alpha.dtype))

    def theirs(self, tensors):
        """Return the columns of alphas, or of what is like alphas, that their code has."""
        if self.columns is None:
            return tensors
        return [t.gather(1, columns) for t, columns in zip(tensors, self.columns, strict=True)]

    def parts(self, tensors):
        """Yield, for each of their weights, the part of ours; `tensors` are like our weights."""
        ids = [id(weight) for weight in self.model.weights()]
        ours = dict(zip(ids, tensors, strict=True))
        for name in self.names:
            key, part, parts = place(name, self.config)
            yield ours[id(self.model.get_parameter(key))].chunk(parts)[part]

    def norms(self, tensors):
        return torch.stack([part.norm() for part in self.parts(tensors)])

    def hand_in(self, monkeypatch):
        """Put what their code drew in the place of torch's random numbers."""
        size = 16 * self.config["init_channels"]  # channels times height, in every cell

        def noise(*shape, randn=torch.randn, **options):  # each edge's is that of a tensor alone
            if len(shape) < 4:  # the start of Lanczos' method
                return randn(*shape, **options)
            n, c, h, w = shape
            one = torch.sin(1 + 7 * torch.arange(n * size * w, dtype=torch.float64))
            return one.view(n, size // h, h, w).repeat(1, c * h // size, 1, 1)

        draw = {
            (torch.Tensor, "exponential_"): lambda empty: empty.copy_(next(self.drawn)),
            (torch, "_sample_dirichlet"): lambda concentration: next(self.drawn),
            (torch, "rand"): lambda *shape, device: next(self.drawn).view(shape),
            (torch, "randn"): noise,
        }
        for (where, name), function in draw.items():
            monkeypatch.setattr(where, name, function)

    def set_draws(self, step, batch):
        draws = step["draws"][batch] if "draws" in step else []
        if "keeps" in step:  # of all cells, for the edges that leave one state after the other
            states = edges_by_state(self.config["num_nodes"])
            draws = [cell[edges].double() for cell in step["keeps"][batch] for edges in states]
        self.drawn = cycle(draws)  # every forward pass has the same
        self.model.drop_path_prob = step.get("drop_path_prob", 0.0)

    def alpha_step(self, step, xi=0.0):
        self.set_draws(step, "val")
        x, y = step["val"]
        close(F.cross_entropy(self.model(x), y), step["val_loss"])
        penalty = self.model.relaxation.penalty
        batches = step["train"], step["val"]
        grads = architecture_gradient(
            self.model, F.cross_entropy, *batches, xi, self.w_optimizer, penalty=penalty
        )
        all_close(self.theirs(grads), step["alpha_grads"])
        for alpha, grad in zip(self.model.alphas(), grads, strict=True):
            alpha.grad = grad
        self.alpha_optimizer.step()
        all_close(self.theirs(self.model.alphas()), step["alphas_after"])

    def w_step(self, step):
        self.set_draws(step, "train")
        x, y = step["train"]
        self.w_optimizer.zero_grad()
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        close(logits, step["logits"])
        close(loss, step["train_loss"])
        for w in self.model.weights():
            if w.grad is None:  # not drawn anywhere; train_search.py decays it all the same
                w.grad = torch.zeros_like(w)
        grads = [w.grad for w in self.model.weights()]
        close(self.norms(grads), step["weight_grad_norms"])
        norm = torch.nn.utils.clip_grad_norm_(self.model.weights(), self.config["w_grad_clip"])
        close(norm, step["weight_grad_norm"])
        self.w_optimizer.step()


# Contiguous by default where all operations are mixed, where few are, and in S1 to S4.
@pytest.mark.parametrize(
    "file, layout",
    [
        *((file, "channels_last") for file in FILES),
        *((file, "contiguous") for file in FILES if file not in ("drnas", "fairdarts")),
        pytest.param("drnas", "contiguous", marks=pytest.mark.slow),
        pytest.param("fairdarts", "contiguous", marks=pytest.mark.slow),
    ],
)
def test_search_follows_the_authors_code(file, layout, monkeypatch):
    golden = load(file)
    search = Search(golden, layout)
    search.hand_in(monkeypatch)
    for step in golden["steps"]:
        if search.config.get("w_first"):
            search.w_step(step)
            search.alpha_step(step)
        else:
            search.alpha_step(step)
            search.w_step(step)
    close(search.norms(search.model.weights()), golden["weight_norms_after_steps"])
    assert len(golden["steps"]) == 3


@pytest.mark.parametrize("layout", CHANNELS_LAST_BY_DEFAULT)
def test_second_order_of_pcdarts_follows_the_authors_code(layout):
    golden = load("pcdarts")
    search = Search(golden, layout)
    (step,) = golden["steps_second_order"]
    search.alpha_step(step, golden["config"]["xi"])
    search.w_step(step)
    expected = golden["weight_norms_after_steps_second_order"]
    close(search.norms(search.model.weights()), expected)


@pytest.mark.parametrize("file", FILES)
def test_mixtures_are_those_of_the_authors_code(file):
    golden = load(file)
    search = Search(golden)
    mixes = search.model.mixtures()
    if file == "robustdarts_S1":  # of seven operations, an edge has two
        assert [mix.count_nonzero(1).tolist() for mix in mixes] == [[2] * 14, [2] * 14]
    all_close(search.theirs(mixes), golden["mixtures"])


@pytest.mark.parametrize("file", ROBUST)
def test_spaces_are_those_of_robustdarts(file):
    config = load(file)["config"]
    space = SPACES[config["space"]]
    assert list(space.primitives) == config["primitives"]
    choices = space.choices or [[space.primitives] * 14] * 2
    assert [[list(edge) for edge in cell] for cell in choices] == config["choices"]


def test_penalty_of_fairdarts_is_the_zero_one_loss_of_both_cells():
    golden = load("fairdarts")
    alphas, weight = golden["alphas"], golden["config"]["zero_one_weight"]
    close(Sigmoid(weight).penalty(alphas), golden["penalty"])
    for step in golden["steps"]:
        close(Sigmoid(1.0).penalty(alphas), step["zero_one_loss"])
        penalty = step["val_loss_with_penalty"] - step["val_loss"]
        close(Sigmoid(weight).penalty(alphas), penalty)
        alphas = step["alphas_after"]


@pytest.mark.parametrize("layout", CHANNELS_LAST_BY_DEFAULT)
@pytest.mark.parametrize("file", ROBUST)
def test_largest_eigenvalue_is_that_of_robustdarts(file, layout, monkeypatch):
    golden = load(file)
    search = Search(golden, layout)
    search.hand_in(monkeypatch)
    hessian = golden["hessian"]
    value = largest_eigenvalue(search.model, F.cross_entropy, hessian["batch"], tolerance=1e-12)
    # Their Hessian has the weight decay of alpha on its diagonal.
    decay = golden["config"]["alpha_weight_decay"]
    close(torch.tensor(value, dtype=torch.float64) + decay, hessian["largest_eigenvalue"])


@pytest.mark.parametrize("file", FILES)
def test_genotypes_are_those_of_the_authors_rule(file):
    golden = load(file)
    search = Search(golden)
    model = search.model
    if file == "drnas":  # their code ranks by the softmax of alpha, ours by the Dirichlet's mean
        model.relaxation = Softmax()
    (rule,) = golden["genotypes"].values()  # of FairDARTS `parse_method darts`, not its threshold
    second_choices, cells = 0, (rule["normal"], rule["reduce"])
    for i in range(20):
        search.set_alphas([alphas[i] for alphas in rule["alphas"]])
        for ours, theirs in zip(model.genotype()[::2], cells, strict=True):
            assert len(ours) == len(theirs[i]) == 8
            for node in range(0, 8, 2):
                first, second = theirs[i][node : node + 2]
                assert ours[node] == first
                # GDAS keeps the two best (operation, predecessor), which may be on one edge.
                if file != "gdas" or first[1] != second[1]:
                    assert ours[node + 1] == second
                    second_choices += 1
    assert second_choices == 160 if file != "gdas" else 80 < second_choices < 160


def without_mask(model, x):
    """Compute `model(x)` as before the gradient was right.

    Operations that edges share were then weighted by one matrix product: all that were drawn, for
    all edges that had drawn one, with weights of value 0 where an edge had drawn another.
    """
    mixes = [mix.index_select(0, model.edge_order) for mix in model.mixtures(random=True)]
    s0 = s1 = F.relu(model.stem(x))
    for cell in model.cells:
        mix = mixes[cell.reduction]
        drawn = mix != 0
        blocks = drawn.split([mixed_op.fan for mixed_op in cell.mixed_ops])
        for mixed_op, block in zip(cell.mixed_ops, blocks, strict=True):
            shared = block[:, mixed_op.shared_columns]
            block[:, mixed_op.shared_columns] = shared.any(1, keepdim=True) & shared.any(0)
        out = cell(s0, s1, mix, drawn.tolist())
        s0, s1 = s1, F.relu(out)
    return model.classifier(out.mean((2, 3)))


def test_gdas_gradient_passes_through_the_drawn_operations_only(monkeypatch):
    """Ours is that of the authors' code; a straight-through estimator alone has more.

    It shows where two edges that leave one state draw different ones of the operations that they
    share (pools, skip): only in the second of the three steps.
    """
    golden = load("gdas")
    search = Search(golden)
    search.hand_in(monkeypatch)
    off_without_mask = []
    for step in golden["steps"]:
        search.w_step(step)
        search.set_draws(step, "val")
        x, y = step["val"]
        expected = torch.cat(step["alpha_grads"])
        errors = []
        for logits in (search.model(x), without_mask(search.model, x)):
            grads = torch.autograd.grad(F.cross_entropy(logits, y), search.model.alphas())
            error = (torch.cat(grads) - expected).abs().max() / expected.abs().max()
            errors.append(error.item())
        print(f"gradient in alpha, off by so much of its largest entry: {errors[0]:.1e};", end=" ")
        print(f"without the mask: {errors[1]:.1e}")
        assert errors[0] < 1e-9
        off_without_mask.append(errors[1])
        search.alpha_step(step)
    assert max(off_without_mask) > 0.3
