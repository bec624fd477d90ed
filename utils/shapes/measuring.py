"""The detector of whichever world a configuration names."""

from torch import Tensor

from utils.shapes.detector import measure_plain
from utils.shapes.measurement import Measurement
from utils.shapes.physics import ShapesConfig
from utils.shapes.rich_detector import measure_rich
from utils.shapes.scenes import Scene, World


def measure(clip: Tensor, scene: Scene, config: ShapesConfig = ShapesConfig()) -> Measurement:
    """Compare a clip [F 3 H W] in [-1, 1] with the scene that it should show. The result is on the CPU.

    Raises:
        ValueError: the clip does not have the size of the world, or the plain world has a scene with two objects.
    """
    if clip.ndim != 4 or clip.shape[1:] != (3, config.resolution, config.resolution):
        raise ValueError(f"clip has shape {tuple(clip.shape)}: expected [F 3 {config.resolution} {config.resolution}]")
    clip = clip.detach().float().cpu()
    if config.world is World.rich:
        return measure_rich(clip, scene, config)
    if scene.second is not None:
        raise ValueError("the plain world has one object in a scene: use ShapesConfig(world=World.rich)")
    return measure_plain(clip, scene, config)
