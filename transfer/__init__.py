"""Where expert weights lie and how they move: mapped files now; device slots and copies later."""
