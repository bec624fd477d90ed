"""Configuration, files, tracking, video and the Shapes world. Every other package may use this one."""
