"""Pictures of a MuJoCo scene without OpenGL: the same pixels on every machine.

Every geom is a convex body. Its outline on the screen is the hull of its projected corners, and the
inverse depth of each face is a linear function of the pixel, so the visible surface is the least
of the front faces' inverse depths. A depth buffer joins the bodies; nothing is sorted.

Shape letters: N corners, F faces, S side of the (oversampled) picture in pixels.
"""

from dataclasses import dataclass
from functools import cache

import cv2
import mujoco
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Image = NDArray[np.uint8]

SEEN_GROUPS = (0, 1)
TABLE = "table"
NEAR_M = 0.008
SEGMENTS = 16
"""Sides of a cylinder or capsule."""
SHADE = 0.30
"""Share of light that a shadow takes from the table."""
AMBIENT, KEY, FILL = 0.46, 0.46, 0.16
KEY_LIGHT = np.array([0.35, -0.45, 1.0]) / np.linalg.norm([0.35, -0.45, 1.0])
FILL_LIGHT = np.array([0.9, 0.5, 0.35]) / np.linalg.norm([0.9, 0.5, 0.35])
WALL_TOP, WALL_BOTTOM = np.array([176, 190, 200.0]), np.array([222, 226, 228.0])
SUBPIXEL_BITS = 4


@dataclass(frozen=True, kw_only=True)
class Solid:
    """A convex body about its own origin: corners N,3 and, per face, corner indices."""

    corners: Array
    faces: tuple[tuple[int, ...], ...]


class Renderer:
    """Draws one model at one size; any number of cameras and MjData."""

    def __init__(self, model: mujoco.MjModel, size: int, *, supersample: int = 2) -> None:
        self._model = model
        self._size = size
        self._side = size * supersample
        table = model.geom(TABLE)
        self._table_low = (table.pos - table.size)[:2]
        self._table_high = (table.pos + table.size)[:2]
        self._table_rgb = 255 * model.geom_rgba[table.id, :3]
        self._geoms = [
            g for g in range(model.ngeom) if model.geom_group[g] in SEEN_GROUPS and g != table.id
        ]
        solids = [_solid(model.geom_type[g], model.geom_size[g]) for g in self._geoms]
        self._corners = np.concatenate([s.corners for s in solids])
        self._corner_geom = np.repeat(self._geoms, [len(s.corners) for s in solids])
        self._corner_ends = np.cumsum([0, *(len(s.corners) for s in solids)]).tolist()
        self._face_geom = np.repeat(self._geoms, [len(s.faces) for s in solids])
        self._face_ends = np.cumsum([0, *(len(s.faces) for s in solids)]).tolist()
        self._normals = np.concatenate([_normals(s) for s in solids])
        self._face_corner = np.array(
            [
                start + face[0]
                for start, solid in zip(self._corner_ends[:-1], solids, strict=True)
                for face in solid.faces
            ]
        )
        self._rays: dict[float, tuple[Array, Array, float]] = {}
        self._backdrops: dict[bytes, Image] = {}

    def render(self, data: mujoco.MjData, camera: str) -> Image:
        """The picture ``size, size, 3`` (RGB) that ``camera`` sees; kinematics must be current."""
        camera_id = self._model.camera(camera).id
        position = data.cam_xpos[camera_id]
        rotation = data.cam_xmat[camera_id].reshape(3, 3)
        xs, ys, focal = self._pixel_rays(float(self._model.cam_fovy[camera_id]))
        geom_rotation = data.geom_xmat.reshape(-1, 3, 3)
        corners = data.geom_xpos[self._corner_geom] + np.einsum(
            "nij,nj->ni", geom_rotation[self._corner_geom], self._corners
        )
        normals = np.einsum("fij,fj->fi", geom_rotation[self._face_geom], self._normals)

        image = self._backdrop(position, rotation, xs, ys)
        self._cast_shadows(image, corners, position, rotation, focal)
        self._draw_solids(image, corners, normals, position, rotation, xs, ys, focal)
        if self._side == self._size:
            return image
        small: Image = cv2.resize(image, (self._size,) * 2, interpolation=cv2.INTER_AREA)
        return small

    def _pixel_rays(self, fovy: float) -> tuple[Array, Array, float]:
        """Per pixel column x/-z and row y/-z in the camera frame (1,S and S,1), focal length."""
        if fovy not in self._rays:
            side = self._side
            focal = 0.5 * side / np.tan(np.radians(fovy) / 2)
            across = (np.arange(side) + 0.5 - side / 2) / focal
            self._rays[fovy] = across[None, :], -across[:, None], focal
        return self._rays[fovy]

    def _backdrop(self, position: Array, rotation: Array, xs: Array, ys: Array) -> Image:
        """Wall and table. Cameras that stand still get a copy of what was drawn before."""
        key = position.tobytes() + rotation.tobytes()
        if key not in self._backdrops:
            if len(self._backdrops) > 1:
                self._backdrops.pop(next(reversed(self._backdrops)))
            self._backdrops[key] = self._draw_backdrop(position, rotation, xs, ys)
        return self._backdrops[key].copy()

    def _draw_backdrop(self, position: Array, rotation: Array, xs: Array, ys: Array) -> Image:
        """Table where a ray meets z = 0 inside the table's rectangle, wall elsewhere."""
        right, up, back = rotation.T
        falls = -(xs * right[2] + ys * up[2] - back[2])
        reach = position[2] / np.maximum(falls, 1e-6)
        ground_x = position[0] + reach * (xs * right[0] + ys * up[0] - back[0])
        ground_y = position[1] + reach * (xs * right[1] + ys * up[1] - back[1])
        on_table = (
            (falls > 1e-6)
            & (ground_x > self._table_low[0])
            & (ground_x < self._table_high[0])
            & (ground_y > self._table_low[1])
            & (ground_y < self._table_high[1])
        )
        far = np.hypot(ground_x - 0.2, ground_y)
        light = 1.04 - 0.35 * np.minimum(far, 0.6)
        mix = np.linspace(0, 1, len(ys))[:, None, None]
        wall = np.broadcast_to(WALL_TOP + mix * (WALL_BOTTOM - WALL_TOP), (*light.shape, 3))
        picture = np.where(on_table[..., None], light[..., None] * self._table_rgb, wall)
        return picture.clip(0, 255).astype(np.uint8)

    def _cast_shadows(
        self, image: Image, corners: Array, position: Array, rotation: Array, focal: float
    ) -> None:
        """Darken the table where a body stands between it and the key light."""
        fallen = corners - corners[:, 2:] / KEY_LIGHT[2] * KEY_LIGHT
        pixels, depth = self._project(fallen, position, rotation, focal)
        mask = np.zeros(image.shape[:2], np.uint8)
        for a, b in zip(self._corner_ends[:-1], self._corner_ends[1:], strict=True):
            if depth[a:b].min() > NEAR_M:
                cv2.fillConvexPoly(
                    mask, cv2.convexHull(pixels[a:b]), 255, cv2.LINE_8, SUBPIXEL_BITS
                )
        blur = max(3, self._side // 64) | 1
        mask = cv2.blur(mask, (blur, blur))
        rows = np.flatnonzero(mask.any(1))
        if len(rows):
            part = slice(rows[0], rows[-1] + 1)
            keep = 255 - (SHADE * mask[part]).astype(np.uint8)
            cv2.multiply(image[part], cv2.merge([keep] * 3), dst=image[part], scale=1 / 255)

    def _draw_solids(
        self,
        image: Image,
        corners: Array,
        normals: Array,
        position: Array,
        rotation: Array,
        xs: Array,
        ys: Array,
        focal: float,
    ) -> None:
        """Draw every body into ``image``, nearest surface first by a depth buffer."""
        pixels, depth = self._project(corners, position, rotation, focal)
        toward = ((corners[self._face_corner] - position) * normals).sum(1)
        planes = normals @ rotation / np.where(toward, toward, 1.0)[:, None]
        colours = self._lit(normals)
        nearest = np.zeros(image.shape[:2])
        boxes = self._outline_boxes(pixels)
        for k in range(len(self._geoms)):
            a, b = self._corner_ends[k : k + 2]
            left, top, right, bottom = boxes[k]
            if depth[a:b].min() <= NEAR_M or left >= right or top >= bottom:
                continue
            faces = np.arange(*self._face_ends[k : k + 2])
            faces = faces[toward[faces] < 0]
            if not len(faces):
                continue
            window = (slice(top, bottom), slice(left, right))
            outline = cv2.convexHull(pixels[a:b]) - np.array([left, top], np.int32) * (
                1 << SUBPIXEL_BITS
            )
            mask = np.zeros((bottom - top, right - left), np.uint8)
            cv2.fillConvexPoly(mask, outline, 1, cv2.LINE_8, SUBPIXEL_BITS)
            normal = planes[faces][:, :, None, None]
            inverse = normal[:, 0] * xs[:, left:right] + (
                normal[:, 1] * ys[top:bottom] - normal[:, 2]
            )  # F, rows, columns
            front = inverse.min(0)
            seen = (front > nearest[window]) & (mask != 0)
            np.copyto(nearest[window], front, where=seen)
            np.copyto(image[window], colours[faces][inverse.argmin(0)], where=seen[..., None])

    def _outline_boxes(self, pixels: NDArray[np.int32]) -> list[list[int]]:
        """Per body: left, top, right, bottom in whole pixels, cut to the picture."""
        starts = self._corner_ends[:-1]
        low = (np.minimum.reduceat(pixels, starts) >> SUBPIXEL_BITS).clip(0, self._side)
        high = (np.maximum.reduceat(pixels, starts) >> SUBPIXEL_BITS).clip(-2, self._side - 2) + 2
        boxes: list[list[int]] = np.concatenate([low, high], 1).tolist()
        return boxes

    def _project(
        self, points: Array, position: Array, rotation: Array, focal: float
    ) -> tuple[NDArray[np.int32], Array]:
        """Pixel coordinates N,2 (fixed point) and depths N of world points."""
        local = (points - position) @ rotation
        depth = -local[:, 2]
        scale = focal / np.maximum(depth, 1e-4)
        flat = np.stack(
            [
                self._side / 2 - 0.5 + local[:, 0] * scale,
                self._side / 2 - 0.5 - local[:, 1] * scale,
            ],
            1,
        )
        return (flat * (1 << SUBPIXEL_BITS)).clip(-(2**20), 2**20).astype(np.int32), depth

    def _lit(self, normals: Array) -> Image:
        """Colour of every face under the two lights."""
        light = (
            AMBIENT + KEY * (normals @ KEY_LIGHT).clip(0) + FILL * (normals @ FILL_LIGHT).clip(0)
        )
        rgb = 255 * self._model.geom_rgba[self._face_geom, :3] * light[:, None]
        colours: Image = rgb.clip(0, 255).astype(np.uint8)
        return colours


@cache
def renderer_for(model: mujoco.MjModel, size: int) -> Renderer:
    """The one renderer of this model at this size."""
    return Renderer(model, size)


def _solid(kind: int, size: Array) -> Solid:
    """The corners and faces of a geom; ValueError for a kind that this renderer does not draw."""
    match kind:
        case mujoco.mjtGeom.mjGEOM_BOX:
            return _prism(_RECTANGLE * size[:2], size[2])
        case mujoco.mjtGeom.mjGEOM_CYLINDER:
            return _prism(_circle() * size[0], size[1])
        case mujoco.mjtGeom.mjGEOM_CAPSULE:
            return _round(size[0], size[1])
        case mujoco.mjtGeom.mjGEOM_SPHERE:
            return _round(size[0], 0.0)
    raise ValueError(f"cannot draw a geom of type {kind}")


_RECTANGLE = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])


def _circle() -> Array:
    turn = 2 * np.pi * np.arange(SEGMENTS) / SEGMENTS
    return np.stack([np.cos(turn), np.sin(turn)], 1)


def _prism(outline: Array, half_height: float) -> Solid:
    """The outline (N,2, counter-clockwise) drawn out along z."""
    n = len(outline)
    rings = [np.column_stack([outline, np.full(n, z)]) for z in (-half_height, half_height)]
    walls = [(i, (i + 1) % n, n + (i + 1) % n, n + i) for i in range(n)]
    lids = [tuple(range(n))[::-1], tuple(range(n, 2 * n))]
    return Solid(corners=np.concatenate(rings), faces=(*walls, *lids))


def _round(radius: float, half_length: float) -> Solid:
    """A capsule along z; a sphere when ``half_length`` is 0."""
    n = SEGMENTS
    tilts = np.radians([-67.5, -45.0, -22.5, 22.5, 45.0, 67.5])
    rings = [
        np.column_stack(
            [
                _circle() * radius * np.cos(tilt),
                np.full(n, radius * np.sin(tilt) + np.sign(tilt) * half_length),
            ]
        )
        for tilt in tilts
    ]
    walls = [
        (r * n + i, r * n + (i + 1) % n, (r + 1) * n + (i + 1) % n, (r + 1) * n + i)
        for r in range(len(tilts) - 1)
        for i in range(n)
    ]
    last = (len(tilts) - 1) * n
    lids = [tuple(range(n))[::-1], tuple(range(last, last + n))]
    return Solid(corners=np.concatenate(rings), faces=(*walls, *lids))


def _normals(solid: Solid) -> Array:
    """Outward unit normal of every face, F,3."""
    a, b, c = (solid.corners[[face[i] for face in solid.faces]] for i in range(3))
    normals: Array = np.cross(b - a, c - b).astype(np.float64)
    lengths: Array = np.sqrt((normals * normals).sum(1))
    return normals / lengths[:, None]
