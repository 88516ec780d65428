# Sets PYTHON to an interpreter of at least 3.11: python3 on PATH where that is one, else the
# newest of the versioned ones. One that can make virtual environments is preferred; Debian's lacks
# that without a package, which cmake/environments.py then installs or names.

function(find_python result)
  set(fits "import sys; sys.exit(sys.version_info < (3, 11))")
  set(fits_with_venv "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))")
  foreach(check IN ITEMS "${fits_with_venv}" "${fits}")
    foreach(name IN ITEMS python3 python3.14 python3.13 python3.12 python3.11 python)
      unset(found)
      find_program(found NAMES ${name} NO_CACHE)
      if(found)
        execute_process(COMMAND "${found}" -c "${check}" RESULT_VARIABLE status OUTPUT_QUIET ERROR_QUIET)
        if(status EQUAL 0)
          set(${result} "${found}" PARENT_SCOPE)
          return()
        endif()
      endif()
    endforeach()
  endforeach()
  message(FATAL_ERROR
    "spimpi needs Python 3.11 or newer; none of python3, python3.14, python3.13, python3.12, "
    "python3.11, python on PATH is one.\n"
    "On Debian 12 or Ubuntu 24.04 and later: sudo apt-get install python3 python3-venv\n"
    "On a cluster: often `module load python`. Then run the same command again.")
endfunction()

find_python(PYTHON)
execute_process(COMMAND "${PYTHON}" --version OUTPUT_VARIABLE version OUTPUT_STRIP_TRAILING_WHITESPACE)
message(STATUS "${version}: ${PYTHON}")
