"""The reproduction of the paper's claim in the Shapes world: what is trained, how it is measured, and the report."""
