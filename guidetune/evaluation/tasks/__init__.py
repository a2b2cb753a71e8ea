"""Tasks: one file each, found by file name. The contract is `guidetune.evaluation.task`."""
