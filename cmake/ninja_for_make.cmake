# The presets leave the generator to CMake, whose default wants make. Where only Ninja is installed
# the build step would fail: there a stand-in for make configures for Ninja and builds the target.
# Include before project(), which is where CMake looks for make.

if(CMAKE_GENERATOR STREQUAL "Unix Makefiles")
  find_program(CMAKE_MAKE_PROGRAM NAMES gmake make)
  if(NOT CMAKE_MAKE_PROGRAM)
    find_program(NINJA NAMES ninja ninja-build samu)
    if(NOT NINJA)
      message(FATAL_ERROR
        "Neither make nor ninja is on PATH. On Debian and Ubuntu: sudo apt-get install make; "
        "or without root: pip install ninja. Then run the same command again.")
    endif()
    configure_file(
      "${CMAKE_CURRENT_LIST_DIR}/make.in" "${CMAKE_BINARY_DIR}/make" @ONLY
      FILE_PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
    set(CMAKE_MAKE_PROGRAM "${CMAKE_BINARY_DIR}/make" CACHE FILEPATH "Stands in for make" FORCE)
  endif()
endif()
