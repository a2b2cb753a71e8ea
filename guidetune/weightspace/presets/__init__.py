"""Published methods of merging: one file each, made of the stages of `guidetune.weightspace.stages`."""
