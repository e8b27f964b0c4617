"""The views of a scene, and the scenes that are rendered: rooms, objects and meshes."""
