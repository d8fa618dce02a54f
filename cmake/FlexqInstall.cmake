# Headers, library, find_package(flexq) and pkg-config.
include(CMakePackageConfigHelpers)

install(TARGETS flexq EXPORT flexq-targets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(DIRECTORY include/flexq DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT flexq-targets NAMESPACE flexq:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/flexq)

# A static library leaves its own needs to whoever links it, from C too.
set(FLEXQ_RUNTIME stdc++ m)
configure_package_config_file(cmake/flexq-config.cmake.in ${PROJECT_BINARY_DIR}/flexq-config.cmake
  INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/flexq)
# Before 1.0 a minor version may break the API.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/flexq-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/flexq-config.cmake ${PROJECT_BINARY_DIR}/flexq-config-version.cmake
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/flexq)

if(BUILD_SHARED_LIBS)
  set(FLEXQ_PC_CFLAGS "")
  set(FLEXQ_PC_LIBS_PRIVATE "")
else()
  set(FLEXQ_PC_CFLAGS " -DFLEXQ_STATIC")
  list(JOIN FLEXQ_RUNTIME " -l" runtime)
  set(FLEXQ_PC_LIBS_PRIVATE " -l${runtime} -pthread${FLEXQ_CUDA_PC_LIBS}")
endif()
configure_file(cmake/flexq.pc.in ${PROJECT_BINARY_DIR}/flexq.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/flexq.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
