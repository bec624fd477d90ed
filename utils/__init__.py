"""Configuration, files, tracking, video and the Shapes world: what every other package may use."""
