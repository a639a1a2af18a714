"""Fully sharded training over every process of the run, on CPU (gloo) and GPU alike."""

from __future__ import annotations

from lightning.pytorch.strategies import ModelParallelStrategy


class FSDP2(ModelParallelStrategy):
    """`ModelParallelStrategy` with the whole world in the data-parallel group and no tensor parallelism.

    Its parent's defaults are the other way round: tensor parallelism over all devices of a node.

    Args:
        save_distributed_checkpoint: every process saves its shard into a folder; by default one full file is saved,
            which one process can load as well.
    """

    def __init__(self, *, save_distributed_checkpoint: bool = False) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)

    def setup_environment(self) -> None:
        """Size the data-parallel group now that the number of processes is known."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
