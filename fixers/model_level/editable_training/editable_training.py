"""Editable training: learn weights that a few gradient steps can patch, then patch the failures.

Phase A minimises, over all weights theta and the editor's decay,

    L = CE(f(x; theta), y) + c_loc * CE(softmax f(x; theta), softmax f(x; theta_e)) + c_edit * l_e(theta_e)

with theta_e the weights after an edit that starts from theta, and l_e what is left of that edit's loss. Phase B edits
the failures that are left.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fixers import training
from fixers.data import Batch
from fixers.fixer import Fixer, Level, parameter
from fixers.model_level.editable_training.edit_quality import (
    FeatureBatches,
    Pairs,
    apply_edit,
    measure,
    outputs_of,
    scores,
    wrong_pairs,
)
from fixers.model_level.editable_training.editing import (
    EditableModel,
    Editor,
    Graph,
    ResidualLinear,
    add_residual_block,
)
from fixers.problem import RepairProblem
from fixers.requirements import Requirement, TrainingSamples, TwiceDifferentiable
from fixers.training.best_weights import BestWeights


@dataclass(frozen=True)
class EditableTraining(Fixer):
    """Training through simulated edits, then edits of the failures.

    How the study repaired with it isn't published. Here half of the simulated edits force failures of the repair split
    to their labels and half, as in the paper, random training images to random labels. After training, the failures
    that are left are edited one after the other, starting from the weights so far; an edit is kept if it succeeds,
    undoes none before it, and accuracy on valid stays within ``tolerance`` of that after training. The best of the
    states so reached on valid is returned, the latest of equal ones; the original isn't among them.

    Drawdown is measured every epoch with the same valid samples and labels, so that epochs compare; the public code
    draws new ones, from the test set.

    Peak memory: parameters, gradients, optimiser state and the best weights (six copies with Adam), ``most_steps + 1``
    copies of the editable parameters with as many graphs of ``edit_size`` samples, or ten copies of the editable
    parameters while drawdown is measured, and activations of one micro-batch; in phase B up to 256 MiB of features.
    """

    name: ClassVar[str] = "editable_training"
    abbreviation: ClassVar[str] = "ET"
    level: ClassVar[Level] = "model"
    reference: ClassVar[str] = (
        "A. Sinitsin, V. Plokhotnyuk, D. Pyrkin, S. Popov, A. Babenko: Editable Neural Networks. ICLR 2020. "
        "arXiv:2004.00345"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (TrainingSamples(), TwiceDifferentiable())
    extends_architecture: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {
            "locality": 0.1,
            "editability": 0.1,
            "batch_size": 32,
            "epochs": 15,
            "learning_rate": 3e-3,
            "patience": 5,
        },
        # The original stops after 500 evaluations without progress only; this is the upper end of the grids. It edits
        # one stage of a ResNet18; a LeNet5 is small enough to edit as a whole.
        "study": {"epochs": 50, "patience": 20},
    }

    locality: float = parameter(
        0.01, grid=(0.001, 0.01, 0.1), low=0.0, help="c_loc: factor on what an edit changes elsewhere."
    )
    editability: float = parameter(
        0.01, grid=(0.001, 0.01, 0.1), low=0.0, help="c_edit: factor on the loss that an edit leaves."
    )
    editable: Literal["all", "last_stage", "last_two_linear", "residual_block"] = parameter(
        "all",
        grid=("all", "last_stage", "last_two_linear", "residual_block"),
        help="What edits change; residual_block adds a block before the last Linear layer, and to the architecture.",
    )
    block_width: int = parameter(4096, low=1, help="Hidden units of an added residual block.")
    editor: Literal["rmsprop", "sgd"] = parameter("rmsprop", help="Rule of the steps of an edit.")
    edit_rate: float = parameter(1e-3, grid=(1e-4, 1e-3, 1e-2), low=1e-12, help="Learning rate of an edit's steps.")
    edit_decay: float = parameter(0.5, low=0.0, high=1.0, help="How much of RMSProp's squared gradients a step keeps.")
    edit_momentum: float = parameter(0.0, low=0.0, high=1.0, help="Momentum of an edit's steps.")
    learned: Literal["none", "decay", "rate_and_decay"] = parameter(
        "decay", help="Which of the editor's own parameters are trained along."
    )
    most_steps: int = parameter(10, grid=(3, 5, 10), low=1, help="Steps after which an edit has failed.")
    second_order: bool = parameter(
        True, help="Differentiate through the gradients of an edit; without it the memory of one step is enough."
    )
    edit_size: int = parameter(1, grid=(1, 4), low=1, help="Samples that a simulated edit forces together.")
    failure_share: float = parameter(
        0.5, low=0.0, high=1.0, help="Share of simulated edits of repair failures; the rest are random."
    )
    locality_samples: int = parameter(0, low=0, help="Samples of a batch that locality is judged on; 0 for all.")
    main_loss: Literal["labels", "distillation"] = parameter(
        "labels", help="What a batch is trained on: its labels, or the outputs of the original."
    )
    optimizer: Literal["adam", "sgd"] = parameter(
        "adam", grid=("adam", "sgd"), help="Optimiser of the training; SGD has momentum 0.9."
    )
    learning_rate: float = parameter(1e-3, grid=(1e-5, 1e-4, 1e-3), low=0.0, help="Its learning rate.")
    block_learning_rate: float = parameter(1e-3, low=0.0, help="Its learning rate for an added residual block.")
    weight_decay: float = parameter(0.0, low=0.0, help="Its weight decay (L2).")
    largest_gradient: float = parameter(10.0, grid=(1.0, 10.0), low=0.0, help="Norm that gradients are clipped to.")
    batch_size: int = parameter(128, grid=(64, 128), low=1, help="Training samples of a step.")
    epochs: int = parameter(30, grid=(20, 50), low=1, help="Most passes over the training set.")
    patience: int = parameter(
        10, grid=(5, 10, 20), low=1, help="Epochs without better accuracy or drawdown after which it stops."
    )
    valid_edits: int = parameter(10, low=1, help="Edits that drawdown is measured with every epoch.")
    patch_size: int = parameter(1, grid=(1, 8, 32), low=1, help="Failures that are edited together in phase B.")
    tolerance: float = parameter(
        0.005, grid=(0.0, 0.005), low=0.0, high=1.0, help="Accuracy on valid that phase B may cost, as a fraction."
    )

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Train for edits, then edit the failures.

        Raises:
            DeadlineExceededError: the time limit has passed.
            FixFailedError: the model has no such layers as ``editable`` asks for.
        """
        model = problem.new_model()
        if self.editable == "residual_block":
            shape = problem.repair.shape
            add_residual_block(model, shape, self.block_width, problem.generator("residual block"))
        view = EditableModel(model, self.editable, problem.repair.shape)
        editor = self._editor().to(problem.device)
        score = self._train(model, view, editor, problem)
        left = problem.wrong_on(model, problem.failures)
        problem.note(failures_fixed_by_training=int((~left).sum()))
        self._patch(model, view, editor, problem, score)
        left = problem.wrong_on(model, problem.failures)
        problem.note(failures_fixed_in_all=int((~left).sum()))
        return model

    def _editor(self) -> Editor:
        return Editor(
            rate=self.edit_rate, decay=self.edit_decay, momentum=self.edit_momentum, rmsprop=self.editor == "rmsprop",
            most_steps=self.most_steps, learned=self.learned.split("_and_"),
        )  # fmt: skip

    def _train(self, model: nn.Module, view: EditableModel, editor: Editor, problem: RepairProblem) -> float:
        """Phase A. The best epoch on valid wins; returns its score."""
        together = nn.ModuleList([model, editor])
        optimizer = self._optimizer(together)
        order, draw = problem.generator("order"), problem.generator("edits")
        pairs = wrong_pairs(problem, self.valid_edits)
        best, lowest, waiting = BestWeights(together, -1.0), float("inf"), 0
        for epoch in range(1, self.epochs + 1):
            total = 0.0
            for batch in problem.train.batches(self.batch_size, device=problem.device, generator=order):
                problem.check_deadline()
                optimizer.zero_grad(set_to_none=True)
                total += self.accumulate(model, view, editor, batch, self._pairs(problem, draw), problem)
                # With the editor's own parameters, as in the public code.
                nn.utils.clip_grad_norm_(together.parameters(), self.largest_gradient)
                optimizer.step()
            quality = measure(view, editor, pairs, problem)
            better = best.offer(together, quality.score) or quality.drawdown < lowest
            lowest = min(lowest, quality.drawdown)
            waiting = 0 if better else waiting + 1
            problem.report(
                epoch, loss=total / len(problem.train), valid_score=quality.score, drawdown=quality.drawdown,
                edit_success=quality.success, edit_steps=quality.steps,
            )  # fmt: skip
            if waiting >= self.patience:
                break
        best.restore(together)
        quality = measure(view, editor, pairs, problem)
        problem.note(
            epochs=epoch, trained_valid_score=quality.score, trained_drawdown=quality.drawdown,
            trained_edit_success=quality.success, trained_edit_steps=quality.steps, edit_decay=editor.decay.item(),
        )  # fmt: skip
        return quality.score

    def accumulate(
        self,
        model: nn.Module,
        view: EditableModel,
        editor: Editor,
        batch: Batch,
        pairs: Pairs,
        problem: RepairProblem,
    ) -> float:
        """Add the gradients of one step of phase A to ``.grad`` of all parameters.

        The graph of the edit is walked back once, with what all micro-batches have to say of the edited weights.

        Args:
            model: left in eval mode; running statistics are those of the batch without the edit.
            view: of the model.
            editor: its learned parameters get gradients too.
            batch: N training samples.
            pairs: what the edit forces.
            problem: device, task and micro-batch.

        Returns:
            The three terms of the loss, times N.
        """
        size = len(batch.targets)
        parts = training.micro_batches(batch, problem.micro_batch)
        model.train()
        total, before = 0.0, []
        for part in parts:
            outputs = model(part.inputs)
            loss = self._main_loss(outputs, part, problem)
            (loss / size).backward()
            total += loss.item()
            before.append(outputs.detach().softmax(dim=-1))
        # In eval mode, so that neither the edit nor a look at what it did moves running statistics.
        model.eval()
        features = view.features(pairs.inputs)
        graph: Graph = "second_order" if self.second_order else "first_order"
        edit = editor.edit(view.weights, outputs_of(view, features, problem), pairs.targets, problem.task, graph)
        judged = min(size, self.locality_samples or size)
        edited = {name: weight.detach().requires_grad_(True) for name, weight in edit.weights.items()}
        left = judged
        for part, shares in zip(parts, before, strict=True):
            inputs, shares = part.inputs[:left], shares[:left]
            left -= len(inputs)
            if len(inputs) == 0 or self.locality == 0:
                break
            after = view.outputs(edited, view.features(inputs)).log_softmax(dim=-1)
            loss = -self.locality * (shares * after).sum() / judged
            loss.backward()
            total += size * loss.item()
        roots = [*edit.weights.values(), edit.loss]
        told = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in edited.values()]
        torch.autograd.backward(roots, [*told, torch.full_like(edit.loss, self.editability)])
        return total + size * self.editability * edit.loss.item()

    def _main_loss(self, outputs: Tensor, part: Batch, problem: RepairProblem) -> Tensor:
        """Summed over a micro-batch."""
        if self.main_loss == "labels":
            return problem.task.loss(outputs, part.targets, "sum")
        with torch.no_grad():
            wanted = problem.original(part.inputs).log_softmax(dim=-1)
        divergence: Tensor = (wanted.exp() * (wanted - outputs.log_softmax(dim=-1))).sum()
        return divergence

    def _optimizer(self, together: nn.Module) -> torch.optim.Optimizer:
        blocks = [module.block for module in together.modules() if isinstance(module, ResidualLinear)]
        added = {weight: None for block in blocks for weight in block.parameters()}
        kept = [weight for weight in together.parameters() if weight.requires_grad and weight not in added]
        groups: list[dict[str, Any]] = [{"params": kept}]
        if added:
            groups.append({"params": list(added), "lr": self.block_learning_rate})
        if self.optimizer == "adam":
            return torch.optim.Adam(groups, lr=self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(groups, lr=self.learning_rate, momentum=0.9, weight_decay=self.weight_decay)

    def _pairs(self, problem: RepairProblem, draw: torch.Generator) -> Pairs:
        """Failures with their labels and random training samples with random labels, the true one not excluded."""
        count, failures = self.edit_size, problem.failures
        is_failure = torch.rand(count, generator=draw) < self.failure_share
        rows = torch.randint(len(failures), (count,), generator=draw)[is_failure]
        others = torch.randint(len(problem.train), (count,), generator=draw)[~is_failure]
        labels = torch.randint(problem.task.n_classes, (count,), generator=draw)[~is_failure]
        inputs = [failures.inputs(rows, problem.device), problem.train.inputs(others, problem.device)]
        return Pairs(torch.cat(inputs), torch.cat([failures.labels[rows], labels]).to(problem.device))

    def _patch(
        self, model: nn.Module, view: EditableModel, editor: Editor, problem: RepairProblem, trained: float
    ) -> None:
        """Phase B, in place."""
        limit, best, patched_at_best = trained - self.tolerance, BestWeights(model, trained), 0
        patched: list[int] = []
        failed = rejected = undoing = 0
        valid = FeatureBatches(view, problem.valid, problem)
        for number, block in enumerate(problem.failures.batches(self.patch_size, device=problem.device), start=1):
            problem.check_deadline()
            edit = apply_edit(view, editor, block, problem)
            if edit.steps == 0:
                continue
            if not edit.success:
                failed += 1
                continue
            score = scores(view, [edit.weights], valid, problem)[0]
            problem.report(self.epochs + number, patched_valid_score=score)
            if not score >= limit:
                rejected += 1
                continue
            earlier = problem.failures.select(torch.tensor(patched, dtype=torch.int64))
            if patched and scores(view, [edit.weights], FeatureBatches(view, earlier, problem), problem)[0] < 1.0:
                undoing += 1
                continue
            patched += block.indices.tolist()
            with torch.no_grad():
                for name, weight in view.weights.items():
                    weight.copy_(edit.weights[name])
            if score >= best.score:
                best, patched_at_best = BestWeights(model, score), len(patched)
        best.restore(model)
        problem.note(
            failures_patched=len(patched), patches_returned=patched_at_best, patches_failed=failed,
            patches_rejected=rejected, patches_undoing_others=undoing, patched_valid_score=best.score,
        )  # fmt: skip
