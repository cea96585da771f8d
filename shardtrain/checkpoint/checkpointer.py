"""`Checkpointer`: committed, verified, mesh-free steps on disk.

Saving: copy to host, return, write in the background, commit by rename, read back, record sizes and
checksums, only then report. Restoring: verify the files on all processes, compare the tree with the
plan, load onto the plan's shardings, compare the fingerprint of the values; a step that fails is
renamed and the one before it is tried.
"""

import concurrent.futures
import json
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shardtrain.checkpoint import (
    agreement,
    commit,
    leaves,
    loading,
    manifest,
    run_directory,
    steps,
    store,
)
from shardtrain.checkpoint.describe import describe_mesh, human_bytes, mesh_of, reason
from shardtrain.checkpoint.fingerprint import as_text, fingerprint
from shardtrain.checkpoint.protocol import CheckpointPlan
from shardtrain.errors import CheckpointError

_LOG = logging.getLogger("shardtrain.checkpoint")


class Checkpointer:
    """Saves and restores the state of one run.

    Args:
        directory: of this run; made when needed. Relative paths and `~` are fine.
        plan: gives the shardings to restore to, whatever mesh the step was saved on.
        max_to_keep: complete steps to keep, None for all. The newest is never deleted, nor are
            steps added to the set `.pinned`.
        timeout: seconds after which a save gives up on another process.
        report: gets one line per event (committed, restored, set aside); default: the logger
            `shardtrain.checkpoint`.

    Use it in a `with` block. Outside of one, call `close()`; a program that forgets to is made to
    wait for the save in flight when it ends. (Python 3.12 cannot: there, outside of `with`, `save`
    itself waits for the commit.)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        plan: CheckpointPlan,
        *,
        max_to_keep: int | None = 3,
        timeout: int = 300,
        report: Callable[[str], None] | None = None,
    ):
        self.directory = steps.resolve(directory)
        self._plan = plan
        self._max_to_keep = max_to_keep
        self._timeout = timeout
        self._report = report or _LOG.info
        self._warn = report or _LOG.warning
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        self._failures: list[tuple[int, BaseException]] = []
        self._prepared = False
        self._inside_with = False
        self.extra: dict[str, Any] = {}
        self.pinned: set[int] = set()
        store.silence_logs()
        store.before_threads_stop(_wait_at_exit(weakref.ref(self)))

    # ------------------------------------------------------------------ saving

    def save(self, state: Any, extra: Mapping[str, Any] | None = None) -> None:
        """Save `state` as step `int(state.step)`; returns when it was copied to host memory.

        The state may be donated or changed afterwards. All processes must call this together.

        Args:
            state: any pytree of arrays with an attribute `step`.
            extra: JSON to keep with it (loader position, metrics); read back as `.extra`.

        Raises:
            RestoreMismatch: the directory holds steps of another model. Nothing was written.
            CheckpointError: a leaf cannot be saved, or the *previous* save failed (this one is
                under way nevertheless).
        """
        self._collect()
        step = int(np.asarray(jax.device_get(state.step)))
        started = time.monotonic()
        named = leaves.named_leaves(self._to_checkpoint(state))
        infos = leaves.describe(named)
        self._prepare(infos)
        if not self._already_saved(step, named):
            run_directory.make_room(self.directory, step, self._warn)
            header = commit.header_of(
                step, infos, self._abstract(), self._described(), _json(extra or {})
            )
            path = steps.step_path(self.directory, step)
            hashes = fingerprint(named)  # before: its collectives must not meet Orbax's barriers
            handle = store.save_async(path, leaves.to_arrays(named), self._timeout)
            saving = commit.Save(handle, path, header, hashes, self._timeout)
            copied = time.monotonic() - started
            thread = concurrent.futures.ThreadPoolExecutor(1, "shardtrain-checkpoint")
            future = thread.submit(self._finish, saving, copied)
            thread.shutdown(wait=False)  # it ends with its work
            self._pending = (step, future)
        self._raise_failures(f"Step {step} is being saved now.")
        if not (self._inside_with or store.can_finish_at_exit()):
            self.wait()

    def _prepare(self, infos: Mapping[str, leaves.LeafInfo]) -> None:
        """Once, before the first save: a shared directory of this very model, swept clean."""
        if self._prepared:
            return
        existing = run_directory.prepare(self.directory)
        if existing is not None:
            path = steps.step_path(self.directory, existing)
            if hasattr(self._plan, "abstract_saved"):  # other replica counts are fine too
                infos = leaves.describe(leaves.named_leaves(self._abstract(path)))
            loading.require_fit(path, infos, self._described())
        run_directory.sweep(self.directory)
        self._prepared = True

    def _already_saved(self, step: int, named: Mapping[str, Any]) -> bool:
        path = steps.step_path(self.directory, step)
        if not agreement.all_agree(manifest.is_complete(path)):
            return False
        same = manifest.read_header(path).fingerprints == as_text(fingerprint(named))
        if same := agreement.all_agree(same and not manifest.problems(path)):
            self._report(f"checkpoint {step} is already there, with the same values")
        return same

    def _finish(self, saving: commit.Save, copied: float) -> None:
        started = time.monotonic()
        size = commit.finish(saving)
        if size is None:
            return
        self._report(
            f"checkpoint {saving.header.step} committed ({human_bytes(size)}, "
            f"{copied:.2f} s to copy, {time.monotonic() - started:.1f} s in the background)"
        )
        steps.retain(self.directory, self._max_to_keep, frozenset(self.pinned))

    def poll(self) -> None:
        """Raise what a background save ran into, without waiting; cheap enough for every step.

        With several processes this does nothing: they learn of it together, at the next `save` or
        `wait`, for one that raises alone would leave the others waiting.
        """
        if jax.process_count() > 1:
            return
        if self._pending is not None and self._pending[1].done():
            self._collect()
        self._raise_failures("Earlier steps are intact.")

    def in_flight(self) -> bool:
        """Whether a save is still being written or verified."""
        return self._pending is not None and not self._pending[1].done()

    def wait(self, together: bool = True) -> None:
        """Wait until the last save is committed and verified.

        Args:
            together: all processes call this; False where this one may be alone (it is failing).

        Raises:
            CheckpointError: it failed on some process; earlier steps are intact.
        """
        self._collect(together)
        self._raise_failures("Earlier steps are intact.")

    def _collect(self, together: bool = True) -> None:
        """Wait for the save in flight and note its failure, if any."""
        if self._pending is None:
            return
        step, future = self._pending
        error = future.exception()  # interrupted here, the save stays known and is waited for later
        self._pending = None
        if together and not agreement.all_agree(error is None) and error is None:
            error = OSError("another process could not save its part")
        if error is not None:
            self._failures.append((step, error))
            run_directory.drop_failed(self.directory, step)

    def _raise_failures(self, consequence: str) -> None:
        if not self._failures:
            return
        failures, self._failures = self._failures, []
        step, error = failures[0]
        raise CheckpointError(
            f"saving step {step} to {self.directory} failed: {reason(error)}. {consequence}"
        ) from error

    def close(self, together: bool = True) -> None:
        """Wait for the save in flight; see `wait` for `together`."""
        self.wait(together)

    def __enter__(self) -> "Checkpointer":
        self._inside_with = True
        return self

    def __del__(self) -> None:
        """Dropped unclosed: the save went on, and its failure must at least be seen."""
        pending = getattr(self, "_pending", None)
        if pending is not None and pending[1].done() and (error := pending[1].exception()):
            sys.stderr.write(f"shardtrain: saving step {pending[0]} failed: {reason(error)}\n")

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._inside_with = False
        try:
            self.close(together=error is None)
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    # ------------------------------------------------------------------ restoring

    def steps(self) -> list[int]:
        """Complete steps on disk, ascending."""
        return steps.committed(self.directory)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def restore(self, step: int | None = None) -> Any:
        """The state of a step, on the current plan's shardings.

        Args:
            step: None for the newest good one: damaged steps are renamed to `N.corrupt` and the
                one before is tried. A given step is restored or an error is raised.

        Returns:
            The state; its `extra` is then in `.extra`.

        Raises:
            RestoreMismatch: the step is of another model; lists every difference.
            CheckpointError: there is no such step, or no good one; says what is wrong with each.
        """
        self.wait()
        if step is not None:
            return self._restore_given(step)
        rejected: list[str] = []
        while (candidate := run_directory.newest(self.directory, self._warn)) >= 0:
            state, found = self._try_restore(candidate)
            if not found:
                return state
            rejected.append(f"step {candidate}: {found[0]}")
            run_directory.quarantine(self.directory, candidate, found, self._warn)
        if rejected:
            raise CheckpointError(
                f"no good step in {self.directory}. " + "; ".join(rejected) + ". The damaged steps "
                "were renamed to *.corrupt, not deleted."
            )
        raise CheckpointError(f"no checkpoint in {self.directory}.")

    def distrust(self, after: int) -> list[int]:
        """Rename the steps later than `after` to `N.suspect`: they may hold wrong values.

        Returns:
            Those steps.
        """
        self.wait()
        return run_directory.distrust(self.directory, after, self._warn)

    def _restore_given(self, step: int) -> Any:
        if step not in steps.present(self.directory):
            raise CheckpointError(
                f"no step {step} in {self.directory}; complete steps: {self.steps()}."
            )
        state, found = self._try_restore(step)
        if found:
            raise CheckpointError(
                f"step {step} in {self.directory} is damaged and was not restored: "
                + "; ".join(found[:5])
            )
        return state

    def _try_restore(self, step: int) -> tuple[Any, list[str]]:
        """The state, or what is wrong with the step on some process."""
        path = steps.step_path(self.directory, step)
        if found := loading.damage(path):
            return None, found
        abstract = self._abstract(path)
        infos = leaves.describe(leaves.named_leaves(abstract))
        loading.require_fit(path, infos, self._described())
        tree, found = loading.load_verified(path, abstract)
        if found:
            return None, found
        header = manifest.read_header(path)
        self.extra = header.extra
        now = describe_mesh(mesh_of(abstract))
        self._report(f"restored step {step}: saved on {describe_mesh(header.mesh)}, now {now}")
        return self._from_checkpoint(tree), []

    def _described(self) -> dict[str, Any]:
        return _json(self._plan.describe())

    def _to_checkpoint(self, state: Any) -> Any:
        convert = getattr(self._plan, "to_checkpoint", None)
        return state if convert is None else convert(state)

    def _from_checkpoint(self, tree: Any) -> Any:
        convert = getattr(self._plan, "from_checkpoint", None)
        return tree if convert is None else convert(tree)

    def _abstract(self, path: Path | None = None) -> Any:
        """What the plan wants to hold; given a step, as far as it may differ in that step."""
        saved = getattr(self._plan, "abstract_saved", None)
        if path is not None and saved is not None:
            return saved({n: x.shape for n, x in manifest.read_header(path).leaves.items()})
        return getattr(self._plan, "abstract_checkpoint", self._plan.abstract_state)


def _json(value: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(value)))
    except TypeError as error:
        raise CheckpointError(f"extra and plan.describe() must be JSON: {error}.") from error


def _wait_at_exit(reference: "weakref.ref[Checkpointer]") -> Callable[[], None]:
    def wait() -> None:
        checkpointer = reference()
        if checkpointer is None:
            return
        try:
            checkpointer.wait(together=False)
        except CheckpointError as error:
            # nobody is left to catch it, and a lost save must not end in success
            sys.stderr.write(f"shardtrain: {error}\n")
            sys.stderr.flush()
            os._exit(1)

    return wait
