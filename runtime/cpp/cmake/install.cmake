# What `cmake --install` puts where: the library, its headers, and the files by which CMake and pkg-config find it.
include(CMakePackageConfigHelpers)

# The number of the C interface is in its header; the C++ interface follows the library's version.
file(STRINGS include/dynexport/dynexport.h ABI REGEX "^#define DYNEXPORT_ABI [0-9]+$")
string(REGEX REPLACE "^#define DYNEXPORT_ABI " "" ABI "${ABI}")
set_target_properties(dynexport PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION ${ABI})
set_source_files_properties(src/c_api.cpp PROPERTIES COMPILE_DEFINITIONS DYNEXPORT_VERSION="${PROJECT_VERSION}")

set(PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/dynexport)
install(TARGETS dynexport EXPORT dynexport)
install(DIRECTORY include/dynexport DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT dynexport NAMESPACE dynexport:: FILE dynexport-targets.cmake DESTINATION ${PACKAGE_DIR})
configure_package_config_file(cmake/dynexport-config.cmake.in dynexport-config.cmake INSTALL_DESTINATION ${PACKAGE_DIR})
write_basic_package_version_file(dynexport-config-version.cmake COMPATIBILITY SameMinorVersion)
# Relative, so that an installed tree can be moved.
file(RELATIVE_PATH PC_PREFIX /x/${CMAKE_INSTALL_LIBDIR}/pkgconfig /x)
string(PREPEND PC_PREFIX "\${pcfiledir}/")
configure_file(cmake/dynexport.pc.in dynexport.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/dynexport-config.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/dynexport-config-version.cmake DESTINATION ${PACKAGE_DIR})
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/dynexport.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
