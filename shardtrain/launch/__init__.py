"""Starting, joining and supervising the processes of a run."""
