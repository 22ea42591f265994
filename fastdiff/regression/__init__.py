"""Two states of a project, compared: which is slower, by how much, and how sure that is."""
