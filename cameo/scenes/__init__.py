"""What a scene hands over, and the scenes that are rendered: rooms, objects and meshes."""
